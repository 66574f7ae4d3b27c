"""``POST /v1/vqa`` and ``/v1/vqa/estimate``: a question about an image, in the server's own form."""

from __future__ import annotations

import asyncio
import time
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from pydantic import ValidationError
from starlette.responses import JSONResponse

from ergo_server.api.errors import from_validation
from ergo_server.api.schemas import (
    CropInfo,
    ErrorEnvelope,
    Estimate,
    EstimateFields,
    ImageInfo,
    RegionInfo,
    VqaFields,
    VqaResponse,
    _Form,
    dump,
)
from ergo_server.api.service import Service
from ergo_server.api.stream import event_stream, sse, sse_error, unless_gone
from ergo_server.errors import RequestError
from ergo_server.imaging.decode import read_header
from ergo_server.imaging.geometry import baseline_visual_tokens, visual_tokens
from ergo_server.intake.body import image_bytes, read_fields
from ergo_server.pipeline import AnswerDelta, Done, Event, ReasoningDelta, RegionFound, Task
from ergo_server.protocol.base import Question

F = TypeVar("F", bound=_Form)

_IMAGE_SCHEMA = {
    "description": "a data: URL, or an object with base64",
    "anyOf": [{"type": "string"}, {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}],
}


def _bodies(fields: type[_Form]) -> dict[str, Any]:
    """Describe the three forms of the body for the OpenAPI document."""
    schema = fields.model_json_schema()
    required = [*schema.get("required", []), "image"]
    as_json = {**schema, "properties": {"image": _IMAGE_SCHEMA, **schema["properties"]}, "required": required}
    file = {"type": "string", "format": "binary"}
    as_form = {**schema, "properties": {"image": file, **schema["properties"]}, "required": required}
    content = {"application/json": as_json, "multipart/form-data": as_form, "image/*": file}
    return {"requestBody": {"required": True, "content": {kind: {"schema": form} for kind, form in content.items()}}}


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorEnvelope, "description": text}
    for status, text in {
        400: "a field is missing or wrong",
        404: "no such model",
        413: "the body or the image is too large",
        415: "a content type or an image format that is not read",
        422: "the image cannot be used",
        502: "the engine failed",
        503: "the engine is not there, or busy",
        504: "the engine took too long",
    }.items()
}


def router(service: Service) -> APIRouter:
    """Return the two routes."""
    routes = APIRouter(tags=["questions"])

    @routes.post(
        "/v1/vqa", response_model=VqaResponse, responses=_ERRORS, openapi_extra=_bodies(VqaFields), summary="Ask about an image"
    )
    async def vqa(request: Request) -> Response:
        """Answer a question about a large image: look at the whole within the budget, zoom into the region that matters, answer.

        Send JSON, a multipart form, or the image itself with the other fields in the query. With `stream`, the events are
        `region` (as soon as the box is known), `reasoning.delta`, `answer.delta`, `done` (the whole response) and `error`.
        """
        with service.accepting():
            image, fields = await _read(request, VqaFields)
            pipeline = service.pipeline(fields.model)
            budget = service.budget(fields.max_visual_tokens)
        task = Task(
            image=image,
            question=Question(fields.question, tuple(fields.choices), fields.instructions.strip()),
            budget=budget,
            zoom="never" if fields.model == "ergo-single" else fields.zoom,
            max_tokens=fields.max_tokens,
            temperature=fields.temperature,
            top_p=fields.top_p,
            seed=fields.seed,
        )
        received = time.perf_counter() - request.scope["received_at"]

        def show(event: Event) -> str:
            return _show(event, fields, received)

        if fields.stream:
            return await event_stream(request, pipeline.stream(task), show, sse_error)
        result = await unless_gone(request, pipeline.answer(task))
        return JSONResponse(dump(VqaResponse.of(result, model=fields.model, include=list(fields.include), received=received)))

    @routes.post(
        "/v1/vqa/estimate",
        response_model=Estimate,
        responses=_ERRORS,
        openapi_extra=_bodies(EstimateFields),
        summary="What a question would cost",
    )
    async def estimate(request: Request) -> Response:
        """Count visual tokens from the image's header: nothing is decoded, and the engine is not asked."""
        image, fields = await _read(request, EstimateFields)
        service.pipeline(fields.model)
        budget = service.budget(fields.max_visual_tokens)
        header = await asyncio.to_thread(read_header, image, max_pixels=service.max_pixels)
        overview = budget.view_size(header.size)
        wanted = "never" if fields.model == "ergo-single" else fields.zoom
        zoom = wanted == "always" or (wanted == "auto" and not budget.holds(header.size))
        cost, baseline = visual_tokens(overview), baseline_visual_tokens(header.size)
        crop = budget.max_visual_tokens if zoom else 0
        shown = Estimate(
            model=fields.model,
            image=ImageInfo.of(header),
            zoom=zoom,
            overview=CropInfo(width=overview.width, height=overview.height),
            visual_tokens={
                "overview": cost,
                "crop_max": crop,
                "total_max": cost + crop,
                "baseline": baseline,
                "saved_ratio_min": 1 - (cost + crop) / baseline,
            },
        )
        return JSONResponse(shown.model_dump(mode="json"))

    return routes


async def _read(request: Request, form: type[F]) -> tuple[bytes, F]:
    """Read the image and the fields of a request."""
    values = await read_fields(request)
    if values.get("image") in (None, "", b""):
        raise RequestError("image: a question needs an image", param="image")
    image = await image_bytes(values.pop("image"))
    try:
        return image, form.model_validate(values)
    except ValidationError as error:
        raise from_validation(error) from error


def _show(event: Event, fields: VqaFields, received: float) -> str:
    match event:
        case RegionFound(region=region, header=header):
            info = RegionInfo.of(region, header, crop="crop" in fields.include)
            return sse(info.model_dump(mode="json"), "region")
        case ReasoningDelta(text=text):
            return sse({"text": text}, "reasoning.delta")
        case AnswerDelta(text=text):
            return sse({"text": text}, "answer.delta")
        case Done(result=result):
            return sse(dump(VqaResponse.of(result, model=fields.model, include=list(fields.include), received=received)), "done")
