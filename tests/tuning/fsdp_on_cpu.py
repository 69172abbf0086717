"""Runs train.py under FSDP2 on CPUs (gloo), which torch can do and accelerate does not offer.

accelerate turns "several processes, and FSDP asked for" into its FSDP mode for every kind of device but the CPU, where it
quietly falls back to DDP. One line of its state is set here; all else is the path that a GPU run takes.
"""

import runpy
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, DistributedType, PartialState

usual = AcceleratorState.__init__


def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    usual(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


AcceleratorState.__init__ = with_fsdp
sys.argv = sys.argv[1:]
sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as if that script had been started
runpy.run_path(sys.argv[0], run_name="__main__")
