"""steer-heal: a trait into a model's weights, without breaking the model.

Under BEARTYPE=1 every annotated shape is checked at run time (jaxtyping's import hook with beartype).
"""

import os

if os.environ.get("BEARTYPE") == "1":
    from jaxtyping import install_import_hook

    install_import_hook("steer_heal", "beartype.beartype")
