"""The JSON of /v2, for its description in OpenAPI."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from service.api.inference_protocol.tensors import Datatype

State = Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]


class _Open(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class _Strict(BaseModel):
    """Unknown fields are refused."""

    model_config = ConfigDict(protected_namespaces=(), extra="forbid")


class ErrorText(_Open):
    """The envelope of every error under /v2."""

    error: str


class ServerMetadata(_Open):
    """What answers."""

    name: str
    version: str
    extensions: list[str]


class Live(_Open):
    """The process answers."""

    live: Literal[True] = True


class Ready(_Open):
    """Requests can be served."""

    ready: Literal[True] = True


class ModelReady(_Open):
    """The model can be used."""

    name: str
    ready: Literal[True] = True


class TensorMetadata(_Open):
    """A tensor of a model's signature."""

    name: str
    datatype: Datatype
    shape: list[int] = Field(description="-1 stands for the number of rows.")


class ModelMetadata(_Open):
    """A model's signature."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class InputTensor(_Strict):
    """An input: data, or binary_data_size bytes behind the JSON."""

    name: str
    datatype: Datatype
    shape: list[int]
    parameters: dict[str, Any] | None = None
    data: list[Any] | None = None


class RequestedOutput(_Strict):
    """An output that is asked for."""

    name: str
    parameters: dict[str, Any] | None = Field(None, description="binary_data: whether its values shall be binary.")


class InferenceRequestBody(_Strict):
    """What a client asks of a model."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"inputs": [{"name": "seed", "datatype": "INT64", "shape": [2], "data": [7, 8]}]}]
        }
    )

    id: str | None = Field(None, max_length=1000, description="Comes back with the answer.")
    model_name: str | None = Field(None, description="The model of the path, where a client names it twice.")
    model_version: str | None = None
    parameters: dict[str, Any] | None = None
    inputs: list[InputTensor]
    outputs: list[RequestedOutput] | None = Field(None, description="All that there are, where it is left out.")


class OutputTensor(_Open):
    """An output: data, or binary_data_size bytes behind the JSON."""

    name: str
    datatype: Datatype
    shape: list[int]
    parameters: dict[str, Any] | None = None
    data: list[Any] | None = None


class InferenceAnswer(_Open):
    """What a model gave."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="warnings: what must be known of the answer.")
    outputs: list[OutputTensor]


class IndexEntry(_Open):
    """A model and where it stands."""

    name: str
    version: str
    state: State
    reason: str
