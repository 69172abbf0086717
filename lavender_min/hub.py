"""Models of huggingface.co: whether one can be had, before anything tries to load it.

`from_pretrained` of a gated or misspelt name tries again and again for a minute before it says so. This says so at once.
"""

from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError


def ask(name: str, file: str) -> None:
    """Returns if `name` is a folder, a model whose `file` is in the cache, or a model that may be downloaded.

    Raises OSError otherwise, in one line, with what the network or the hub says.
    """
    try:
        if not Path(name).is_dir() and not isinstance(try_to_load_from_cache(name, file), str):
            HfApi().auth_check(name)
    except HFValidationError as error:
        raise OSError("there is no such folder") from error
    except Exception as error:
        # The HTTP library has errors of its own, which are no OSErrors.
        raise OSError(f"huggingface.co says: {' '.join(str(error).split()) or type(error).__name__}") from error
