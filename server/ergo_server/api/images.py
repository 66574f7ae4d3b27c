"""``/v1/images``: upload an image once, ask about it many times."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from ergo_server.api.bodies import ERRORS, bodies, read_question
from ergo_server.api.schemas import ErrorEnvelope, StoredImage, UploadFields
from ergo_server.api.service import Service
from ergo_server.api.stream import unless_gone
from ergo_server.intake.store import Stored


def router(service: Service) -> APIRouter:
    """Return the three routes."""
    routes = APIRouter(tags=["images"])
    unknown: dict[int | str, dict[str, Any]] = {404: {"model": ErrorEnvelope, "description": "no such image, or no longer"}}

    @routes.post(
        "/v1/images",
        status_code=201,
        response_model=StoredImage,
        responses=ERRORS,
        openapi_extra=bodies(UploadFields),
        summary="Upload an image",
    )
    async def upload(request: Request) -> Response:
        """Keep an image for a while. Questions name it by its id: `"image": "img_…"`; they skip its upload and its overview.

        Only who uploaded it can use it. It is in the memory of this one server process: behind several replicas, send all that
        is about one image to the same.
        """
        image, fields = await read_question(request, service, UploadFields)
        await unless_gone(request, image.overview(service.budget(fields.max_visual_tokens)))
        stored = service.store.put(service.tenant(request).name, image)
        return JSONResponse(await _shown(stored), status_code=201)

    @routes.get("/v1/images/{image_id}", response_model=StoredImage, responses=unknown, summary="An uploaded image")
    async def show(request: Request, image_id: str) -> Response:
        """Say what is known of an uploaded image; not its bytes."""
        return JSONResponse(await _shown(service.store.get(service.tenant(request).name, image_id)))

    @routes.delete("/v1/images/{image_id}", responses=unknown, summary="Forget an uploaded image")
    async def delete(request: Request, image_id: str) -> dict[str, Any]:
        """Forget an uploaded image before its time."""
        service.store.delete(service.tenant(request).name, image_id)
        return {"id": image_id, "object": "image", "deleted": True}

    return routes


async def _shown(stored: Stored) -> dict[str, Any]:
    header = await stored.original.header()
    left = max(0.0, stored.expires_at - time.time())
    return StoredImage.stored(stored.id, header, stored.original.file.size, stored.expires_at, left).model_dump(mode="json")
