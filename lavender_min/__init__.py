"""lavender-min: Diffusion Instruction Tuning, compact. Teaches a vision-language model where to look.

Axes, in every signature: b batch, h query heads, hkv key heads, t text tokens, p keys (patches and whatever else is
attended), d head dim, n picked tokens, w words, k tokens of a word, c channels, g grid side (32), l layers, s steps.

*host*: the VLM being tuned. *map*: one word's g × g attention. *canvas*: the picture's patches in picture order.
*recipe*: how Stable Diffusion is run to read its maps.

    stage 1   extract.py    data ─► diffusion ─► maps
    stage 2   train.py      data + maps ─► hosts ─► align ─► model, training
    stage 3   evaluate.py   report
"""

import logging

# bitsandbytes, on some CPUs, looks for a package named like our folder kernels/, and complains on every start.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
