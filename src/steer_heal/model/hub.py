"""A quick check whether the hub can be reached. The hub's own client retries for a minute."""

from __future__ import annotations

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from steer_heal.errors import UserError

TIMEOUT_S = 5.0
"""Time limit of the only attempt to reach the hub."""


def from_cache_alone(model: str) -> bool:
    """Whether a model must be loaded from the cache because the hub cannot be reached. UserError if it is not
    cached."""
    try:
        get_hf_file_metadata(hf_hub_url(model, "config.json"), timeout=TIMEOUT_S)
    except (HfHubHTTPError, HFValidationError):  # the hub answered, or need not be asked: loading reports the error
        return False
    except Exception as error:  # not connected, too slow, HF_HUB_OFFLINE: each library has its own error
        if isinstance(try_to_load_from_cache(model, "config.json"), str):
            return True
        raise UserError(
            f"model is {model!r}: there is no such folder, the cache ({HF_HUB_CACHE}) does not contain it, and the hub "
            f"cannot be reached ({str(error).splitlines()[0] if str(error) else type(error).__name__}); give the path "
            "of a model, or connect once to fill the cache (unset HF_HUB_OFFLINE if it is set)"
        ) from None
    return False
