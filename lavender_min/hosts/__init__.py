"""The vision-language models that are tuned: `base` says what a family must tell us, and each file beside it is one."""
