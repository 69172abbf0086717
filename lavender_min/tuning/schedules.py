"""What changes over a run, as functions of the step: λ, and how long the Aligner trains alone.

Nothing here is remembered from step to step, so that a run that goes on from a checkpoint does what an unbroken one does.
"""

import math

# What λ is multiplied by when this share of the run's steps is done. 0 is reached where the run ends, after its last step, as the
# Trainer's schedules of the learning rate have it. The paper's λ is constant: an inverse variance, "a hyperparameter tuned based
# on validation performance" (App. C.2). A λ that falls lets the diffusion model's attention lead first, and the task at the end.
LAMBDA_SCHEDULES = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


def aligner_steps(given: float, steps: int) -> int:
    """--pretrain_aligner_steps in steps, of a run of `steps`: below 1 it is a share of them, of which at least one step is left."""
    return int(given) if given >= 1 or not given else max(1, round(given * steps))
