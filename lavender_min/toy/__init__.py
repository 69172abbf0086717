"""A small world where the truth is known: scenes of coloured shapes, what can be said of them, and two models trained on it.

`world` draws scenes and talks about them, `data` deals them out as examples, `models` says how the two models are
built, `pretrain` trains them, and `models/` holds the result in the ordinary folders of diffusers and transformers.
"""
