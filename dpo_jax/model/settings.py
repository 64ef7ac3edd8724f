"""Settings of the model and of the devices it is laid out on."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

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


AUTO, FITTING = "auto", ("attention", "dots", "names", "block")
"""Policies of which `auto` takes the first that there is room for: each computes more again than the one before it."""


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
    gradient_dtype: Literal["float32", "compute"] = Field(
        default="float32",
        description="dtype in which devices add up their parts of the gradient of a micro-batch; compute: that of "
        "compute_dtype, half of the bytes in bfloat16, and each part is rounded",
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
    remat: Literal["auto", "none", "attention", "dots", "names", "block", "offload"] = Field(
        default=AUTO,
        description="what the backward pass keeps of each layer, and does not compute again; auto: attention, or where "
        "by prediction the device's memory has no room for that, the first of dots, names and block that fits; from "
        f"none to block less and less: {'; '.join(f'{name} {row.says}' for name, row in REMATS.items())}",
    )
    attention: Attention = Field(
        default="auto",
        description="what computes attention; auto: of those that are proven for the platform (on NVIDIA GPUs of "
        "compute capability 9.0 or more tokamax, if that package is installed, and cudnn; on TPUs splash; everywhere "
        "xla) the fastest that agrees with the plain formula on this very device, which is tried once and remembered "
        "with the compiled programs",
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

    @field_validator("compile_cache")
    @classmethod
    def _is_a_folder(cls, value: str | None) -> str | None:
        if value is not None and value.lower() in ("off", "none", "no", "false"):
            raise ValueError("model.compile_cache: would be a folder of that name; null keeps none")
        return value


ALL_LINEAR, EXPERTS, ROUTER, PEFT_DEFAULT = "all-linear", "experts", "router", "default"
GROUPS = (ALL_LINEAR, EXPERTS, ROUTER, PEFT_DEFAULT)
"""What `adapter.targets` knows beside names of modules."""
SHAPE = ("rank", "alpha", "targets", "layers", "rank_pattern", "alpha_pattern", "rslora", "dora", "modules_to_save")
"""Settings that say what a new adapter is; one that is gone on with has its own."""


class AdapterSettings(Section):
    """What is trained in place of the whole model: low-rank factors beside some of its matrices (LoRA).

    Without rank and path the whole model is trained.
    """

    rank: int | None = Field(
        default=None,
        gt=0,
        le=4096,
        description="columns of A and rows of B; with it the model's own weights stay as they are, and what is trained "
        "is a few hundredths of their number (null trains the whole model)",
    )
    alpha: float | None = Field(
        default=None, gt=0, description="the product A B is scaled by alpha / rank (default: twice the rank)"
    )
    targets: str | tuple[str, ...] = Field(
        default=ALL_LINEAR,
        description="which matrices: names as the folder has them (q_proj, or any end of a module's path), a regular "
        "expression that matches whole paths, or all-linear (those of attention and MLPs), experts, router, or default "
        "(PEFT's for the family)",
    )
    layers: tuple[int, ...] | None = Field(default=None, description="numbers of the layers, from 0 (default: all)")
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of A's inputs that each training step sets to zero, drawn by seed, step, text and position",
    )
    rslora: bool = Field(default=False, description="scale by alpha / sqrt(rank) (arXiv:2312.03732)")
    dora: bool = Field(
        default=False,
        description="train the norm of each matrix's columns as well (DoRA, arXiv:2402.09353); export.kind is merged",
    )
    rank_pattern: dict[str, int] | None = Field(
        default=None, description="other ranks by pattern of module paths, such as {down_proj: 32}; the first that fits"
    )
    alpha_pattern: dict[str, float] | None = Field(default=None, description="other alphas, in the same way")
    lr_ratio: float = Field(
        default=1.0, gt=0, description="learning rate of B over that of A (LoRA+, arXiv:2402.12354, which takes 16)"
    )
    modules_to_save: tuple[str, ...] = Field(
        default=(),
        description="regular expressions as in model.freeze; leaves that match are trained whole, beside the factors, "
        "and export.kind is merged",
    )
    path: str | None = Field(
        default=None,
        description="folder (or hub id) of a PEFT adapter to go on from, in place of a new one; its own config says "
        "rank, alpha and targets",
    )
    revision: str | None = Field(default=None, description="as model.revision, for adapter.path")

    @property
    def used(self) -> bool:
        """Whether an adapter is trained."""
        return self.rank is not None or self.path is not None

    @model_validator(mode="after")
    def _consistent(self) -> "AdapterSettings":
        found = []
        if self.revision is not None and self.path is None:
            found.append("adapter.revision: is of adapter.path, which is not given; give both, or neither")
        if self.targets in ("", ()):
            found.append("adapter.targets: names nothing; leave it out for all-linear")
        found += [f"adapter.rank_pattern: {key}: {r}: must be from 1 to 4096" for key, r in _outside(self.rank_pattern)]
        found += [f"adapter.alpha_pattern: {key}: {a}: must be > 0" for key, a in _outside(self.alpha_pattern)]
        if found:
            raise ValueError("\n".join(found))
        return self


def _outside(pattern: dict[str, int] | dict[str, float] | None) -> list[tuple[str, float]]:
    whole = pattern is not None and all(isinstance(value, int) for value in pattern.values())
    return [(key, v) for key, v in (pattern or {}).items() if v <= 0 or (whole and v > 4096)]


class MeshSettings(Section):
    """How devices are arranged. One axis may be -1: it takes all devices that the others leave."""

    data: int = Field(default=1, description="replicas of the weights; each sees its own part of the batch")
    fsdp: int = Field(
        default=-1, description="devices that share one copy of the weights; each sees its own part of the batch"
    )
    expert: int = Field(
        default=1,
        description="devices that share the experts of a mixture, to which tokens are sent, and the other weights with "
        "fsdp; each sees its own part of the batch. It divides the number of experts",
    )
    tensor: int = Field(default=1, description="devices that share each matrix product")
    context: int = Field(
        default=1,
        description="devices that share each row, for rows longer than one device holds, and the weights with fsdp; a "
        "power of two that divides the model's heads",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_takes_the_rest(cls, data: object) -> object:
        """Where another axis takes all devices that are left, fsdp does not, unless it is told to."""
        if isinstance(data, Mapping) and "fsdp" not in data and -1 in data.values():
            return {**data, "fsdp": 1}
        return data

    @model_validator(mode="after")
    def _sizes(self) -> "MeshSettings":
        sizes = dict(self)
        rest = [axis for axis, size in sizes.items() if size == -1]
        found = [f"mesh.{axis}: must be > 0, or -1" for axis, size in sizes.items() if size == 0 or size < -1]
        found += [f"mesh.{axis}: only one axis of the mesh may be -1" for axis in rest if len(rest) > 1]
        if self.context > 0 and self.context & (self.context - 1):
            found.append(f"mesh.context: {self.context}: must be a power of two, which the lengths of rows divide by")
        if found:
            raise ValueError("\n".join(found))
        return self
