"""Settings of what becomes of the trained model."""

import re
from typing import Literal

from pydantic import Field, model_validator

from dpo_jax.settings import Section
from dpo_jax.stores import ADDRESS

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


class ExportSettings(Section):
    """How the trained model is written, and where it goes beside the folder `model` of the output."""

    dtype: Literal["same", "float32", "bfloat16"] = Field(
        default="same",
        description="dtype of the exported tensors; same: each as in the folder of model.path. What rounding to fewer "
        "digits leaves of the training is measured and said at the end",
    )
    rounding: Literal["nearest", "random"] = Field(
        default="random",
        description="how trained weights are rounded to bfloat16: up or down at random (by the seed), so that an "
        "update of less than a digit is kept on average, at the price of noise; or to nearest even",
    )
    kind: Literal["adapter", "merged", "both"] | None = Field(
        default=None,
        description="what a run of an adapter leaves: adapter, the PEFT folder OUTPUT/adapter; merged, the whole model "
        "in OUTPUT/model; or both (default: adapter, where its folder can hold all of it)",
    )
    align_eos: bool = Field(
        default=False,
        description="add the token that ends an answer (the chat template's end of turn) to eos_token_id of the "
        "exported generation_config.json, where the folder of model.path does not list it",
    )
    push: str | None = Field(
        default=None,
        description="OWNER/NAME of a hub repository that the result is pushed to, with the token of HF_TOKEN or of "
        "`hf auth login`; or gs://BUCKET/PATH or s3://BUCKET/PATH",
    )
    private: bool = Field(default=True, description="whether that repository is private")

    @model_validator(mode="after")
    def _names_a_repository(self) -> "ExportSettings":
        if self.push is not None and not REPOSITORY.fullmatch(self.push) and not ADDRESS.fullmatch(self.push):
            raise ValueError("export.push: must be OWNER/NAME, a repository of the hub, or gs:// or s3://BUCKET/PATH")
        if self.push is None and not self.private:
            raise ValueError("export.private: nothing is pushed without export.push; leave it out")
        return self
