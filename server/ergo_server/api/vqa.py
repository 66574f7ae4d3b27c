"""``POST /v1/vqa`` and ``/v1/vqa/estimate``: a question about an image, in the server's own form."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from ergo_server.api.bodies import read_question
from ergo_server.api.openapi import ANSWERED, ASKING, ESTIMATING, RATE_LIMITS, answer, image_body, named_events, operation, query
from ergo_server.api.schemas import (
    IMAGE_ID,
    TINY_PNG,
    ErrorEnvelope,
    Estimate,
    EstimateFields,
    EstimateRequest,
    ImageInfo,
    RegionInfo,
    TextDelta,
    ViewInfo,
    VisualTokensEstimate,
    VqaFields,
    VqaRequest,
    VqaResponse,
    dump,
)
from ergo_server.api.service import Service
from ergo_server.api.stream import event_stream, sse, sse_error, unless_gone
from ergo_server.imaging.geometry import baseline_visual_tokens, visual_tokens
from ergo_server.pipeline import AnswerDelta, Done, Event, OverviewMade, ReasoningDelta, RegionFound, Task
from ergo_server.protocol.base import Question

_QUESTION = "What is the code on the red circle?"

_EVENTS = named_events(
    overview=ViewInfo,
    region=RegionInfo,
    reasoning_delta=TextDelta,
    answer_delta=TextDelta,
    done=VqaResponse,
    error=ErrorEnvelope,
)


def router(service: Service) -> APIRouter:
    """Return the two routes."""
    routes = APIRouter(tags=["questions"])

    @routes.post(
        "/v1/vqa",
        **operation(
            "ask",
            "Ask about an image",
            answer("the answer, whole or as it comes", VqaResponse, events=_EVENTS, headers=ANSWERED),
            errors=ASKING,
            body=image_body(
                VqaRequest,
                VqaFields,
                inline=("a data: URL", {"image": f"data:image/png;base64,{TINY_PNG}", "question": _QUESTION}),
                uploaded=("an upload, with choices", {"image": IMAGE_ID, "question": _QUESTION, "choices": ["434", "443"]}),
                streamed=(
                    "an address, with events",
                    {"image": "https://images.example/scene.jpg", "question": _QUESTION, "stream": True, "include": ["crop"]},
                ),
            ),
            parameters=query(VqaFields),
        ),
    )
    async def vqa(request: Request) -> Response:
        """Answer a question about a large image: look at the whole within the budget, zoom into the region that matters, answer.

        Send JSON, a multipart form, or the image itself with the other fields in the query. With `stream`, the events are
        `overview` (if included), `region` (as soon as the box is known), `reasoning.delta`, `answer.delta`, `done` (the whole
        response) and `error`.
        """
        with service.accepting():
            image, fields = await read_question(request, service, VqaFields)
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
            tenant=service.tenant(request).name,
            salt=service.salt(request),
            receive_seconds=service.received(request),
        )

        def show(event: Event) -> str:
            return _show(event, fields)

        if fields.stream:
            return await event_stream(request, _wanted(pipeline.stream(task), fields), show, sse_error)
        result = await unless_gone(request, pipeline.answer(task))
        return JSONResponse(dump(VqaResponse.of(result, model=fields.model, include=list(fields.include))))

    @routes.post(
        "/v1/vqa/estimate",
        **operation(
            "estimate",
            "What a question would cost",
            answer("visual tokens, at most", Estimate, headers=RATE_LIMITS),
            errors=ESTIMATING,
            body=image_body(
                EstimateRequest, EstimateFields, inline=("a data: URL", {"image": f"data:image/png;base64,{TINY_PNG}"})
            ),
            parameters=query(EstimateFields),
        ),
    )
    async def estimate(request: Request) -> Response:
        """Count visual tokens from the image's header: nothing is decoded or fetched, and the engine is not asked."""
        image, fields = await read_question(request, service, EstimateFields)
        service.pipeline(fields.model)
        budget = service.budget(fields.max_visual_tokens)
        header = await image.header()
        overview = budget.view_size(header.size)
        wanted = "never" if fields.model == "ergo-single" else fields.zoom
        zoom = wanted == "always" or (wanted == "auto" and not budget.holds(header.size))
        crop = budget.max_visual_tokens if zoom else 0
        shown = Estimate(
            model=fields.model,
            image=ImageInfo.of(header),
            zoom=zoom,
            overview=ViewInfo(width=overview.width, height=overview.height),
            visual_tokens=VisualTokensEstimate.of(visual_tokens(overview), crop, baseline_visual_tokens(header.size)),
        )
        return JSONResponse(shown.model_dump(mode="json"))

    return routes


async def _wanted(events: AsyncGenerator[Event, None], fields: VqaFields) -> AsyncGenerator[Event, None]:
    """Leave the overview out where nobody asked for it; the stream, and with it the status, then begins with the region."""
    async with contextlib.aclosing(events):
        async for event in events:
            if "overview" in fields.include or not isinstance(event, OverviewMade):
                yield event


def _show(event: Event, fields: VqaFields) -> str:
    match event:
        case OverviewMade(view=view):
            return sse(ViewInfo.of(view, data=True).model_dump(mode="json"), "overview")
        case RegionFound(region=region, header=header):
            info = RegionInfo.of(region, header, crop="crop" in fields.include)
            return sse(info.model_dump(mode="json"), "region")
        case ReasoningDelta(text=text):
            return sse({"text": text}, "reasoning.delta")
        case AnswerDelta(text=text):
            return sse({"text": text}, "answer.delta")
        case Done(result=result):
            return sse(dump(VqaResponse.of(result, model=fields.model, include=list(fields.include))), "done")
