"""``/v1/images``: upload an image once, ask about it many times."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from ergo_server.api.bodies import read_question
from ergo_server.api.openapi import KEYED, RATE_LIMITS, UPLOADING, answer, image_body, operation, path, query
from ergo_server.api.schemas import IMAGE_ID, TINY_PNG, DeletedImage, StoredImage, UploadFields, UploadRequest
from ergo_server.api.service import Service
from ergo_server.api.stream import unless_gone
from ergo_server.errors import NotFound, UnknownImage
from ergo_server.intake.store import Stored

_NEXT = {
    "look": {"operationId": "get_image", "parameters": {"image_id": "$response.body#/id"}, "description": "what is known of it"},
    "forget": {"operationId": "delete_image", "parameters": {"image_id": "$response.body#/id"}, "description": "forget it"},
}
"""What can be done with an upload, beside asking about it."""


def router(service: Service) -> APIRouter:
    """Return the three routes."""
    routes = APIRouter(tags=["images"])
    named, errors = path("image_id", "what the upload answered", IMAGE_ID), (*KEYED, NotFound, UnknownImage)

    @routes.post(
        "/v1/images",
        status_code=201,
        **operation(
            "upload_image",
            "Upload an image",
            answer("it is kept", StoredImage, status=201, headers=RATE_LIMITS, links=_NEXT),
            errors=UPLOADING,
            body=image_body(UploadRequest, UploadFields, inline=("a data: URL", {"image": f"data:image/png;base64,{TINY_PNG}"})),
            parameters=query(UploadFields),
        ),
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

    @routes.get(
        "/v1/images/{image_id}",
        **operation("get_image", "An uploaded image", answer("it is still kept", StoredImage), errors=errors, parameters=named),
    )
    async def show(request: Request, image_id: str) -> Response:
        """Say what is known of an uploaded image; not its bytes."""
        return JSONResponse(await _shown(service.store.get(service.tenant(request).name, image_id)))

    @routes.delete(
        "/v1/images/{image_id}",
        **operation(
            "delete_image", "Forget an uploaded image", answer("it is forgotten", DeletedImage), errors=errors, parameters=named
        ),
    )
    async def delete(request: Request, image_id: str) -> DeletedImage:
        """Forget an uploaded image before its time."""
        service.store.delete(service.tenant(request).name, image_id)
        return DeletedImage(id=image_id)

    return routes


async def _shown(stored: Stored) -> dict[str, Any]:
    header = await stored.original.header()
    left = max(0.0, stored.expires_at - time.time())
    return StoredImage.stored(stored.id, header, stored.original.file.size, stored.expires_at, left).model_dump(mode="json")
