"""Bodies with an image, as they are read."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError

from ergo_server.api.errors import from_validation
from ergo_server.api.schemas import EstimateFields, Form
from ergo_server.api.service import Service
from ergo_server.api.stream import unless_gone
from ergo_server.errors import RequestError
from ergo_server.imaging.original import Original
from ergo_server.intake.body import read_fields
from ergo_server.intake.images import Arriving

F = TypeVar("F", bound=Form)


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
