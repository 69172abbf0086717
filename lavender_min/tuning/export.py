"""A tuned model as a plain Hugging Face folder, in which nothing of this package is left.

    python -m lavender_min.tuning.export runs/flickr30k-qlora exported

The adapter is merged into the host's weights as they were published, not into their 4-bit form, so the folder loads with
AutoModelForImageTextToText and AutoProcessor, and with whatever reads such folders (lmms-eval, for one); only the two models of
`hosts.architectures` need that file to be imported first. Takes as much memory as
the host has bytes: 20 GiB for Llama-3.2-11B-Vision; no GPU.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForImageTextToText

from lavender_min import cli
from lavender_min.failing import naming, read_json, shaped
from lavender_min.hosts import processors
from lavender_min.hosts.load import family_of
from lavender_min.tuning import card, runs
from lavender_min.tuning.checkpoints import STATE_FILE

PROG = "export"
ADAPTER_FILE = "adapter_config.json"


def base_of(folder: Path) -> str:
    """The host an adapter was tuned on; the folder itself where every weight was tuned."""
    if (folder / runs.FLAGS_FILE).exists():
        flags = runs.recall(folder)
        return str(folder) if flags.mode == "full" else flags.vlm
    if not (folder / ADAPTER_FILE).exists():
        raise FileNotFoundError(
            f"{folder} holds no {ADAPTER_FILE}: give the --output_dir of a finished run of train.py, or a PEFT adapter"
        )
    file = folder / ADAPTER_FILE
    base = read_json(file, dict).get("base_model_name_or_path")
    return shaped(base, str, f"{file}, base_model_name_or_path")


def export(folder: Path, out: Path) -> None:
    """Writes weights, configs, tokenizer and chat template of the run, or adapter, in `folder` to `out`."""
    base = base_of(folder)
    write(base, None if base == str(folder) else str(folder), out)
    print(f"{out} holds the merged model and its processor")


def write(base: str, adapter: str | None, out: Path) -> None:
    """The same for a host by its hub id or folder, with an adapter or as it is."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: give a new folder")
    # Written aside and renamed, so that what is killed midway is in nobody's way.
    aside = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(aside, ignore_errors=True)
    with naming(base):
        host = AutoModelForImageTextToText.from_pretrained(base, dtype="auto", trust_remote_code=False)
        processor = processors.load(base)
        # PaliGemma's files hold no chat template: the one that it is tuned with goes along.
        processor.chat_template = processor.chat_template or family_of(base, host.config.model_type).chat_template
    if adapter is not None:
        with naming(adapter):
            host = PeftModel.from_pretrained(host, adapter).merge_and_unload(safe_merge=True)
    with naming(out):
        host.save_pretrained(aside)
        processor.save_pretrained(aside)
        run = Path(adapter or base)
        if (run / runs.FLAGS_FILE).exists():
            state = run / STATE_FILE
            card.write(aside, run, read_json(state, dict)["log_history"] if state.exists() else [], whole=True)
        os.replace(aside, out)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(prog=PROG, description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("dir", type=Path, help="the --output_dir of a run of train.py, or a PEFT adapter")
    parser.add_argument("out", type=Path, help="a new folder")
    args = parser.parse_args(argv)
    return cli.run(PROG, lambda: export(args.dir, args.out))


if __name__ == "__main__":
    sys.exit(main())
