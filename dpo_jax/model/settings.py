"""Settings of the model and of the devices it is laid out on."""

from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field, model_validator

from dpo_jax.model.backends.table import BACKENDS
from dpo_jax.settings import Section


class Remat(NamedTuple):
    """What of each layer is kept for the backward pass; the rest is computed again.

    `keeps` are names of values (see `model.remat`), or None for all that are not `cheap`; `products` keeps every matrix
    product with weights too. `attention` has the inside of attention computed again where all else is kept. `host` puts
    what is kept into the host's memory.
    """

    says: str
    keeps: tuple[str, ...] | None = ()
    products: bool = False
    attention: bool = False
    host: bool = False


_NAMED = ("qkv", "context", "attention_out")
REMATS: dict[str, Remat] = {
    "none": Remat("keeps all but the inside of norms and activations", keeps=None),
    "attention": Remat("keeps as much, without the inside of attention", keeps=None, attention=True),
    "dots": Remat("keeps products with weights and what attention gives", keeps=("context", "experts"), products=True),
    "names": Remat(
        "keeps queries, keys, values, what attention gives and its projection; MLPs run again", keeps=_NAMED
    ),
    "block": Remat("keeps nothing but what goes from layer to layer; every layer runs again"),
    "offload": Remat("as names, in the host's memory: as little on the device as block", keeps=_NAMED, host=True),
}
"""Policies; from none to block each keeps less on the device than the one before it, and computes more again. Per token
and layer of an 8B model in bfloat16: dots 2.75 MB and 2 % more arithmetic, names 0.92 MB and 18 %, block 33 %."""


if TYPE_CHECKING:
    Attention = str
else:
    Attention = Literal[("auto", *BACKENDS)]


class ModelSettings(Section):
    """Which model is trained and how it is computed."""

    path: str = Field(description="Hugging Face folder (or hub id) of the policy's starting weights")
    revision: str | None = Field(
        default=None,
        description="branch, tag or commit of a hub id (default: main); a run keeps the commit that it began with",
    )
    resize_embedding: bool = Field(
        default=False,
        description="give the embedding (and a head that is not tied to it) a row for every token of the tokenizer; a "
        "new row is the mean of the old ones, and the exported config.json has the new vocab_size",
    )
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="dtype of activations and matrix products; auto: bfloat16 on accelerators, float32 on a CPU; "
        "float16, for GPUs without bfloat16, scales the loss so that slopes neither vanish nor overflow",
    )
    quantise: Literal["nf4", "fp4", "int8"] | None = Field(
        default=None,
        description="keep the matrices of attention, MLPs and experts of an adapter's base in 4 bits (nf4 or fp4, in "
        "blocks of 64) or 8 (int8, by row), as bitsandbytes has them; null keeps them as the folder has them, which in "
        "bitsandbytes' own folders is in few bits too",
    )
    scan_layers: bool = Field(
        default=True, description="compile one layer and scan over it; false unrolls (longer to compile)"
    )
    router_aux: float | None = Field(
        default=None,
        ge=0,
        description="weight of the load-balancing loss of a mixture of experts; null: as the model's config says "
        "(router_aux_loss_coef, 0 if it does not say); 0 leaves it out",
    )
    remat: Literal["none", "attention", "dots", "names", "block", "offload"] = Field(
        default="attention",
        description="what the backward pass keeps of each layer, and does not compute again; from none to block less "
        f"and less: {'; '.join(f'{name} {row.says}' for name, row in REMATS.items())}",
    )
    attention: Attention = Field(
        default="auto",
        description="what computes attention; auto: the fastest that was verified on the platform (on NVIDIA GPUs of "
        "compute capability 9.0 or more tokamax, if that package is installed, or cudnn; else xla); splash is a kernel "
        "for TPUs",
    )
    freeze: tuple[str, ...] = Field(
        default=(),
        description="regular expressions; leaves whose whole name matches one are not trained, such as "
        "embed/embedding, layers/[0-3]/.* (layers 0 to 3) or layers/\\d+/mlp/.*; they come back bit for bit",
    )
    compile_cache: str | None = Field(
        default="auto",
        description="folder of compiled programs that later runs start from; auto: JAX_COMPILATION_CACHE_DIR, or "
        "dpo_jax/compiled in the user's caches; null keeps none",
    )


class MeshSettings(Section):
    """How devices are arranged. One axis may be -1: it takes all devices that the others leave."""

    data: int = Field(default=1, description="replicas of the weights; each sees its own part of the batch")
    fsdp: int = Field(
        default=-1, description="devices that share one copy of the weights; each sees its own part of the batch"
    )
    tensor: int = Field(default=1, description="devices that share each matrix product")

    @model_validator(mode="after")
    def _sizes(self) -> "MeshSettings":
        sizes = dict(self)
        rest = [axis for axis, size in sizes.items() if size == -1]
        found = [f"mesh.{axis}: must be > 0, or -1" for axis, size in sizes.items() if size == 0 or size < -1]
        found += [f"mesh.{axis}: only one axis of the mesh may be -1" for axis in rest if len(rest) > 1]
        if found:
            raise ValueError("\n".join(found))
        return self
