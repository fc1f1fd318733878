"""Whether a hub model has to come from the cache, known within seconds. The hub's own client tries for a minute."""

from __future__ import annotations

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from steer_heal.errors import UserError

TIMEOUT_S = 5.0
"""Of the one attempt to reach the hub."""


def from_cache_alone(model: str) -> bool:
    """Whether the hub cannot be reached, after one attempt. UserError where the model is not in the cache either."""
    try:
        get_hf_file_metadata(hf_hub_url(model, "config.json"), timeout=TIMEOUT_S)
    except (HfHubHTTPError, HFValidationError):  # the hub answers, or it need not be asked: loading says what is wrong
        return False
    except Exception as error:  # not connected, too slow, HF_HUB_OFFLINE: each layer below has its own errors
        if isinstance(try_to_load_from_cache(model, "config.json"), str):
            return True
        raise UserError(
            f"model is {model!r}: there is no such folder, it is not in the cache ({HF_HUB_CACHE}), and the hub cannot "
            f"be reached ({str(error).splitlines()[0] if str(error) else type(error).__name__}); give the path of a "
            "model, or connect once (and unset HF_HUB_OFFLINE where it is set) so that the cache is filled"
        ) from None
    return False
