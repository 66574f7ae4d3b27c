"""What a body may be, where an image is asked about: how it is documented, and how it is read."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError

from ergo_server.api.errors import from_validation
from ergo_server.api.schemas import ErrorEnvelope, EstimateFields, Form
from ergo_server.api.service import Service
from ergo_server.api.stream import unless_gone
from ergo_server.errors import RequestError
from ergo_server.imaging.original import Original
from ergo_server.intake.body import read_fields
from ergo_server.intake.images import Arriving

F = TypeVar("F", bound=Form)

_IMAGE_SCHEMA = {
    "description": "a data: URL, an object with base64, the id of an uploaded image (img_…), or an https: address",
    "anyOf": [{"type": "string"}, {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}],
}


def bodies(fields: type[Form]) -> dict[str, Any]:
    """Describe the three forms of the body for the OpenAPI document."""
    schema = fields.model_json_schema()
    required = [*schema.get("required", []), "image"]
    as_json = {**schema, "properties": {"image": _IMAGE_SCHEMA, **schema["properties"]}, "required": required}
    file = {"type": "string", "format": "binary"}
    as_form = {**schema, "properties": {"image": file, **schema["properties"]}, "required": required}
    content = {"application/json": as_json, "multipart/form-data": as_form, "image/*": file}
    return {"requestBody": {"required": True, "content": {kind: {"schema": form} for kind, form in content.items()}}}


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorEnvelope, "description": text}
    for status, text in {
        400: "a field is missing or wrong",
        401: "a known API key is needed",
        404: "no such model, or no such uploaded image",
        408: "the body did not arrive in time",
        413: "the body or the image is too large",
        415: "a content type or an image format that is not read",
        422: "the image cannot be used",
        429: "your key's share is used up; Retry-After says when to come back",
        502: "the engine failed",
        503: "the engine is not there, or the server has as much work as it takes; Retry-After says when to come back",
        504: "the engine took too long",
    }.items()
}


async def read_question(request: Request, service: Service, form: type[F]) -> tuple[Original, F]:
    """Read the image and the fields of a request. What arrives as bytes is looked at while it arrives, if it will be at all."""
    images, looks = service.images(request), form is not EstimateFields

    def opened(fields: dict[str, Any]) -> Arriving:
        return images.arriving(service.likely_budget(fields.get("max_visual_tokens")) if looks else None)

    values = await read_fields(request, opened, service.limits.form)
    image = values.pop("image", None)
    if image in (None, ""):
        raise RequestError("image: a question needs an image", param="image")
    try:
        fields = form.model_validate(values)
    except ValidationError as error:
        raise from_validation(error) from error
    service.limits.check_text(fields.texts, "question")
    if isinstance(image, Original):
        return image, fields
    named = images.named(image, budget=service.likely_budget(fields.max_visual_tokens), fetch=looks)
    return await unless_gone(request, named), fields
