"""What becomes of an optimizer's state between steps: on devices, on disk, and under another optimizer.

    state_sharding, footprint        where its arrays live on a mesh, and how many bytes that is
    digest, manifest, verify         whether a restored state is bit for bit the saved one
    from_optax, to_optax             the same moments in the state of another optimizer
    from_torch, to_torch             and in that of PyTorch's Adam and AdamW, as plain arrays
    resize                           the same run with more layers, or fewer, or of another size
    suggest_sharing, share           one noise for many elements, in the middle of a run

`snr_adam.state.files` saves and restores with Orbax; it needs orbax-checkpoint and is imported by itself.
"""

from snr_adam.state.digest import digest, manifest, verify
from snr_adam.state.footprint import footprint
from snr_adam.state.migration import from_optax, to_optax
from snr_adam.state.pytorch import from_torch, to_torch
from snr_adam.state.resizing import resize
from snr_adam.state.sharding import state_sharding
from snr_adam.state.shared_noise import share, suggest_sharing

__all__ = [
    "digest",
    "footprint",
    "from_optax",
    "from_torch",
    "manifest",
    "resize",
    "share",
    "state_sharding",
    "suggest_sharing",
    "to_optax",
    "to_torch",
    "verify",
]
