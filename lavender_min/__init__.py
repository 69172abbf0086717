"""lavender-min: Diffusion Instruction Tuning, compact. Teaches a vision-language model where to look.

    stage 1   extract.py    data ─► teachers ─► maps
    stage 2   train.py      data + maps ─► hosts ─► align ─► tuning
    stage 3   evaluate.py   evaluation

Axes, in every signature. A file that needs another letter says so in its first lines.

    b       texts of a batch, each with its picture
    h, hkv  heads of the queries, heads of the keys
    d       numbers in one head
    t       tokens of a text
    p       keys that a token attends to: patches of the picture, and whatever else
    n       picked rows of the query, of all texts of a batch
    w, m    words of one text, words of a whole batch
    k       tokens of one word
    c       channels
    g       side of a map (32)
    l       layers
    s       diffusion steps
    r       in `teachers`: windows of text, each with its picture

Words for things:

    host    the vision-language model that is tuned
    family  the class that knows hosts of one kind
    view    one look of a host at the picture: all of it in tiles, or a thumbnail
    map     one word's attention over the picture, g × g
    canvas  the picture's patches in picture order
    teacher the frozen model whose maps are the targets: Stable Diffusion
    recipe  how the teacher is run to read its maps
    row     one position of the query: what a host has at one token
"""

import logging

# bitsandbytes, on some CPUs, looks for a package named like our folder kernels/, and complains on every start.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
