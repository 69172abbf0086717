"""Everything that only a GPU can tell, in one command that fits a few borrowed minutes: `make gpu`.

    right    every kernel against float64, on the device itself
    kernels  the three ops beside every honest alternative, and a search over block sizes
    stage1   word maps from Stable Diffusion v1.4 at full size: pictures a second
    stage2   the training step of Llama-3.2-11B-Vision in 4 bits: time, memory, and what the planner said
    whole    the commands of `make demo`, and their losses beside a CPU's

`runner` runs each part in a process of its own, `record` is what a part writes its numbers to, and `table` draws the README's
table from them. Weights are random, since nothing can be downloaded: speed and memory do not depend on their values.
`make gpu TINY=1` runs the same code in small on a CPU, the kernels in Triton's interpreter, so that only sizes and the device
are new on the day.
"""
