"""Models of huggingface.co: whether one can be had, asked before anything tries to load it.

`from_pretrained` of a gated or misspelt name tries again and again for a minute before it says so.
"""

from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError


def ask(name: str, file: str) -> None:
    """Returns at once if `name` is a folder, a model whose `file` is in the cache, or one that may be downloaded.

    Raises OSError, in one line, with whatever the network or the hub says against it.
    """
    try:
        if not Path(name).is_dir() and not isinstance(try_to_load_from_cache(name, file), str):
            HfApi().auth_check(name)
    except HFValidationError as error:
        raise OSError("there is no such folder") from error
    except Exception as error:  # the HTTP library has its own kinds, which are no OSErrors
        raise OSError(f"huggingface.co says: {' '.join(str(error).split()) or type(error).__name__}") from error
