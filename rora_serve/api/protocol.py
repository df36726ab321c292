"""Bodies of our own routes, as their OpenAPI document shows them."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from adapters.names import Action
from rora_serve.host_tier import Tier

Digest = Field(pattern="^sha256:[0-9a-f]{64}$")
# vLLM's own bodies, in which clients may send more than is looked at.
_LENIENT = ConfigDict(extra="ignore")


class _Body(BaseModel):
    """What a client sends: a key that is not known is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Problem(BaseModel):
    """One rule that an adapter breaks; docs/format.md explains the codes."""

    code: str
    where: str = Field(description="file, key, module, tensor or member of an archive")
    message: str


class ErrorDetail(BaseModel):
    """What went wrong, as OpenAI says it."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorDetail


class RefusedDetail(ErrorDetail):
    """Why an adapter is refused."""

    problems: list[Problem] | None = Field(
        None, description="every rule that it breaks; left out where it is none of the format's"
    )


class RefusedBody(BaseModel):
    """The answer for an adapter that breaks a rule or does not fit the base model."""

    error: RefusedDetail


class RankRange(BaseModel):
    """Ranks over the modules of a version."""

    min: int
    max: int


class ModelCard(BaseModel):
    """A model that requests may name, as OpenAI lists it, with what is known of an adapter."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "rora-serve"
    parent: str | None = Field(None, description="the base model, of an adapter")
    version: str | None = Field(None, description="digest of the version that the name means")
    rank: RankRange | None = None


class ModelList(BaseModel):
    """All models that the caller may use."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class VersionCard(BaseModel):
    """One version of an adapter."""

    version: str = Digest
    weights: str = Digest
    added: int = Field(description="seconds since the epoch")
    num_bytes: int = Field(description="of its tensors")
    rank: RankRange
    tier: Tier = Field(
        description="slot: in the engine, and requests or pins need it; host: in the engine's "
        "memory, free to make room; store: on disk alone"
    )
    is_pinned: bool
    num_running_requests: int
    quarantine: str | None = Field(description="why it is not served, if it is not")


class AdapterCard(BaseModel):
    """A name, its versions, oldest first, and the digests that its aliases mean."""

    object: Literal["adapter"] = "adapter"
    name: str
    aliases: dict[str, str]
    versions: list[VersionCard]


class AdapterList(BaseModel):
    """All adapters that the caller may see."""

    object: Literal["list"] = "list"
    data: list[AdapterCard]


class AliasMove(BaseModel):
    """One move of an alias."""

    at: int = Field(description="seconds since the epoch")
    alias: str
    action: Action
    version: str | None = Field(description="what it meant from then on; null: it is gone")


class ModuleScaling(BaseModel):
    """How one module is scaled."""

    name: str
    rank: int
    alpha: float
    scaling: float


class MatchedModule(BaseModel):
    """A module of the adapter that the base model has."""

    name: str
    rank: int
    scaling: float
    norm: float = Field(description="Frobenius norm of scaling * B @ A")
    num_bytes: int


class Receipt(BaseModel):
    """What a version matches in the base model that runs."""

    base: str
    base_fingerprint: str
    is_trained_on_it: bool | None
    matched: list[MatchedModule]
    problems: list[Problem]
    untouched: list[str] = Field(description="linear layers that the adapter leaves as they are")
    num_bytes: int


class AdapterDetail(AdapterCard):
    """An adapter with all that is known of one of its versions."""

    history: list[AliasMove]
    version: str = Field(description="the version that what follows is about")
    modules: list[ModuleScaling]
    receipt: Receipt


class Deleted(BaseModel):
    """What was removed."""

    id: str
    object: Literal["adapter"] = "adapter"
    deleted: Literal[True] = True


class ImportBody(_Body):
    """An adapter that lies below one of the server's import folders."""

    name: str
    path: str
    alias: str = "latest"


class AliasBody(_Body):
    """What an alias is to mean."""

    version: str = Field(description="sha256:<at least 12 digits>, or another alias")


class RollbackBody(_Body):
    """Which alias is to go back."""

    alias: str = "latest"


class LoadLoraBody(BaseModel):
    """vLLM's LoadLoRAAdapterRequest."""

    model_config = _LENIENT

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    is_3d_lora_weight: bool = False


class UnloadLoraBody(BaseModel):
    """vLLM's UnloadLoRAAdapterRequest."""

    model_config = _LENIENT

    lora_name: str
    lora_int_id: int | None = None


class VllmErrorDetail(BaseModel):
    """What went wrong, as vLLM says it: the code is the status."""

    message: str
    type: str
    param: str | None
    code: int


class VllmErrorBody(BaseModel):
    """The body of an error of vLLM's own routes."""

    error: VllmErrorDetail
