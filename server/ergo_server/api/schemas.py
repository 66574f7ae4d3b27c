"""The wire forms, and nothing but forms; OpenAI's are in `chat_schemas`. Lengths are pixels, times milliseconds.

What stands here is also the reference: each field says what it is, in which unit, with an example of the scene in the README.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from ergo_server.imaging.geometry import MAX_VISUAL_TOKENS, MIN_VISUAL_TOKENS
from ergo_server.imaging.header import MAGIC, ImageHeader
from ergo_server.imaging.view import View
from ergo_server.intake.body import RequestLimits
from ergo_server.pipeline import RegionReport, Result, Turn, VisualTokens
from ergo_server.protocol.rewards import box_reward, format_reward

FORMATS = (*dict.fromkeys(name for _, name in MAGIC), "webp")

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1), Field(json_schema_extra={"pattern": r"\S"})]

Model = Annotated[str, Field(json_schema_extra={"enum": ["ergo", "ergo-single"]})]
"""A name that is none of these is not a wrong field but an unknown model, which is another error."""

Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]

TINY_PNG = "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAIAQAAAADsdIMmAAAAD0lEQVR42mP4wACB/BAIAC4AA/0rztGoAAAAAElFTkSuQmCC"
"""An image of 8 x 8 pixels, so that the examples work as they stand."""

IMAGE_ID = "img_kXUG3dHOhbPZ0ZqpQ0Jm4NSe"
REQUEST_ID = "3052d6b2e0c94c358aeefb613b3cf1ae"


class Form(BaseModel):
    """The fields of a request about an image; the image is kept apart. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")

    max_visual_tokens: int | None = Field(
        default=None,
        ge=MIN_VISUAL_TOKENS,
        le=MAX_VISUAL_TOKENS,
        description="pixel budget of each view, in visual tokens (28 x 28 pixels each); unset takes the model's. "
        "A model may take fewer than 16384, ergo-mini 4 to 49: more is a 400 that names the bounds",
        examples=[49],
    )

    @property
    def texts(self) -> list[str]:
        """What the model is given to read."""
        return []


class VqaFields(Form):
    """A question, whatever the form of the body it came in; the image is kept apart."""

    question: Text = Field(
        description=f"what to find out; with choices and instructions at most {RequestLimits().text_chars} characters, "
        "unless the operator set another limit",
        examples=["What is the code on the red circle?"],
    )
    choices: list[Text] = Field(
        default=[],
        max_length=26,
        description="options, shown to the model in the answer turn only",
        examples=[["434", "443", "344"]],
    )
    instructions: str = Field(
        default="", description="how to answer, shown in the answer turn only", examples=["Answer with the digits only."]
    )
    model: Model = Field(default="ergo", description="`ergo` zooms, `ergo-single` does not", examples=["ergo"])
    max_tokens: int | None = Field(
        default=None, ge=1, description="most tokens of the visible answer; the thinking is not counted", examples=[64]
    )
    temperature: float = Field(
        default=0.0, ge=0, le=2, description="of sampling; 0 always takes the likeliest token", examples=[0.0]
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="only the likeliest tokens that together have this probability", examples=[1.0]
    )
    seed: Seed | None = Field(default=None, description="makes sampling repeatable, as far as the engine does", examples=[7])
    zoom: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="`auto` leaves the zoom turn out when the image fits the budget at full resolution",
        examples=["auto"],
    )
    stream: bool = Field(default=False, description="answer with server-sent events", examples=[False])
    include: list[Literal["overview", "crop", "reasoning", "replies", "rewards"]] = Field(
        default=[], description="what else to send back", examples=[["crop", "reasoning"]]
    )

    @property
    def texts(self) -> list[str]:
        """What the model is given to read."""
        return [self.question, *self.choices, self.instructions]


class EstimateFields(Form):
    """What an estimate needs beside the image."""

    model: Model = Field(default="ergo", description="`ergo` zooms, `ergo-single` does not", examples=["ergo"])
    zoom: Literal["auto", "always", "never"] = Field(
        default="auto", description="as the question would say it; `never` estimates one turn", examples=["auto"]
    )


class UploadFields(Form):
    """What an upload needs beside the image: the budget is that of the overview which is kept with it."""


# --- images in JSON -----------------------------------------------------------------------------------------------------

DataUrl = Annotated[
    str, Field(title="data: URL", pattern="^data:[^,]*;base64,", description="the file in base64, as a data: URL")
]
ImageId = Annotated[str, Field(title="id", pattern="^img_", description="what `POST /v1/images` answered")]
ImageAddress = Annotated[
    str,
    Field(
        title="address",
        pattern="^https?://",
        description="where the image is; fetched only where the operator allows it, and never for an estimate",
    ),
]


class InlineImage(BaseModel):
    """An image within JSON."""

    data: str = Field(
        description="the file in base64",
        examples=[TINY_PNG],
        json_schema_extra={"contentEncoding": "base64"},
    )


class WithImage(BaseModel):
    """What JSON says of an image. These forms document: `bodies.read_question` keeps the image apart from the fields."""

    image: DataUrl | ImageId | ImageAddress | InlineImage = Field(
        description="the image: JPEG, PNG, WebP, GIF or BMP", examples=[f"data:image/png;base64,{TINY_PNG}"]
    )


class VqaRequest(VqaFields, WithImage):
    """A question about an image."""


class EstimateRequest(EstimateFields, WithImage):
    """What an estimate is wanted of."""


class UploadRequest(UploadFields, WithImage):
    """An image to keep."""


# --- what is sent back --------------------------------------------------------------------------------------------------


class Shown(BaseModel):
    """What the server sends; each field is always there."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=True)


def only_if_asked(*names: str) -> Callable[[dict[str, Any]], None]:
    """Return what takes fields out of those that are always there."""

    def relax(schema: dict[str, Any]) -> None:
        schema["required"] = [name for name in schema["required"] if name not in names]
        for name in names:
            schema["properties"][name].pop("default", None)

    return relax


class ImageInfo(Shown):
    """The image as it was understood."""

    width: int = Field(ge=1, description="upright width in pixels", examples=[2000])
    height: int = Field(ge=1, description="upright height in pixels", examples=[2000])
    format: str = Field(
        description="found from the bytes, whatever the sender called them",
        examples=["jpeg"],
        json_schema_extra={"enum": [*FORMATS]},
    )
    orientation: int = Field(
        ge=1, le=8, description="EXIF orientation, 1 to 8; all coordinates are in the upright frame", examples=[1]
    )
    animated: bool = Field(description="it has more frames than the first, which alone is looked at", examples=[False])

    @classmethod
    def of(cls, header: ImageHeader) -> ImageInfo:
        """Show a header."""
        return cls(
            width=header.size.width,
            height=header.size.height,
            format=header.format,
            orientation=header.orientation,
            animated=header.animated,
        )


class StoredImage(ImageInfo):
    """An uploaded image."""

    id: str = Field(description="names it in questions", examples=[IMAGE_ID], json_schema_extra={"pattern": "^img_"})
    object: Literal["image"] = Field(default="image", description="what this is")
    bytes: int = Field(ge=1, description="length of the file in bytes", examples=[41918])
    expires_at: int = Field(description="when it is forgotten: seconds since 1970 (Unix time)", examples=[1795455718])
    expires_in: float = Field(ge=0, description="seconds until then", examples=[600.0])

    @classmethod
    def stored(cls, id: str, header: ImageHeader, size: int, expires_at: float, expires_in: float) -> StoredImage:
        """Show an uploaded image."""
        info = ImageInfo.of(header).model_dump()
        return cls(**info, id=id, bytes=size, expires_at=int(expires_at), expires_in=round(expires_in, 3))


class DeletedImage(Shown):
    """An image that is no longer there."""

    id: str = Field(description="what named it", examples=[IMAGE_ID])
    object: Literal["image"] = Field(default="image", description="what it was")
    deleted: Literal[True] = Field(default=True, description="it is forgotten")


class ViewInfo(Shown):
    """A view: what the model saw."""

    width: int = Field(ge=1, description="pixels, a multiple of 28", examples=[168])
    height: int = Field(ge=1, description="pixels, a multiple of 28", examples=[196])
    data: str | None = Field(
        default=None,
        description="data: URL of the PNG, with include=overview or include=crop; else null",
        examples=[f"data:image/png;base64,{TINY_PNG}"],
    )

    @classmethod
    def of(cls, view: View, *, data: bool) -> ViewInfo:
        """Show a view, with its pixels if asked for."""
        return cls(width=view.size.width, height=view.size.height, data=view.data_url if data else None)


class RegionInfo(Shown):
    """What became of the zoom."""

    box: tuple[int, int, int, int] = Field(
        description="x1, y1, x2, y2 of what was cropped, in upright pixels of the image", examples=[(61, 346, 368, 654)]
    )
    normalized: tuple[float, float, float, float] = Field(
        description="the same as fractions of the image's width and height", examples=[(0.0305, 0.173, 0.184, 0.327)]
    )
    seen: tuple[float, float, float, float] | None = Field(
        description="the box as the model wrote it, in pixels of the overview; null where it wrote none",
        examples=[(6.0, 34.0, 36.0, 64.0)],
    )
    area_ratio: float = Field(ge=0, le=1, description="area of the box by that of the image", examples=[0.023639])
    magnification: float = Field(gt=0, description="pixels of the crop per pixel of the overview, linear", examples=[5.584])
    outcome: Literal["zoomed", "clamped", "no_box", "invalid_box", "skipped"] = Field(
        description="`zoomed`; `clamped`: a part of the box was outside; `no_box`, `invalid_box`: the whole image took "
        "the crop's place; `skipped`: there was no zoom turn",
        examples=["zoomed"],
    )
    reason: str | None = Field(
        default=None,
        description="why the zoom was skipped (`requested`, `fits_budget`), or the box was not used (`missing`, `not_numbers`, "
        "`inverted`, `empty`, `outside`); else null",
        examples=["fits_budget"],
    )
    lenient: bool = Field(
        default=False, description="the box was read although its form strayed from the trained one", examples=[False]
    )
    crop: ViewInfo | None = Field(description="what the model saw of the region; null where the zoom was skipped")

    @classmethod
    def of(cls, region: RegionReport, header: ImageHeader, *, crop: bool) -> RegionInfo:
        """Show a region, with the crop's pixels if asked for."""
        return cls(
            box=region.box.edges,
            normalized=region.box.normalized(header.size),
            seen=region.seen,
            area_ratio=region.area_ratio,
            magnification=region.magnification,
            outcome=region.outcome,
            reason=region.reason,
            lenient=region.lenient,
            crop=ViewInfo.of(region.crop, data=crop) if region.crop else None,
        )


class VisualTokensInfo(Shown):
    """What was spent on seeing."""

    overview: int = Field(ge=0, description="visual tokens of the whole image as the model saw it", examples=[49])
    crop: int = Field(ge=0, description="visual tokens of the crop; 0 without zoom", examples=[42])
    extra: int = Field(ge=0, description="visual tokens of other images in the conversation", examples=[0])
    total: int = Field(ge=0, description="visual tokens, each view once", examples=[91])
    baseline: int = Field(
        ge=1, description="visual tokens that the same model would spend without zoom, at most 16384 an image", examples=[5041]
    )
    saved_ratio: float = Field(
        lt=1, description="1 - total / baseline, a fraction; negative where zoom cost more", examples=[0.9819]
    )
    source: Literal["engine", "formula"] = Field(description="who counted", examples=["engine"])

    @classmethod
    def of(cls, tokens: VisualTokens) -> VisualTokensInfo:
        """Show a count."""
        return cls(
            overview=tokens.overview,
            crop=tokens.crop,
            extra=tokens.extra,
            total=tokens.total,
            baseline=tokens.baseline,
            saved_ratio=tokens.saved_ratio,
            source=tokens.source,
        )


class TurnUsage(Shown):
    """Tokens of one turn, as the engine counted them; null where it does not say."""

    turn: Literal["zoom", "answer", "single"] = Field(description="which; `single` where there was no zoom", examples=["zoom"])
    prompt_tokens: int = Field(ge=0, description="tokens of the conversation so far", examples=[78])
    completion_tokens: int = Field(ge=0, description="tokens of the reply", examples=[28])
    cached_tokens: int | None = Field(ge=0, description="prompt tokens found in the engine's prefix cache", examples=[0])
    image_tokens: int | None = Field(ge=0, description="prompt tokens that are visual", examples=[49])

    @classmethod
    def of(cls, turn: Turn) -> TurnUsage:
        """Show a turn."""
        usage = turn.generation.usage
        return cls(
            turn=turn.name,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_tokens=usage.cached_tokens,
            image_tokens=usage.image_tokens,
        )


class PromptDetails(Shown):
    """Parts of the prompt tokens, summed over the turns."""

    cached_tokens: int = Field(ge=0, description="tokens found in the engine's prefix cache", examples=[105])
    image_tokens: int = Field(ge=0, description="visual tokens", examples=[140])


class CompletionDetails(Shown):
    """Parts of the completion tokens."""

    reasoning_tokens: int = Field(ge=0, description="tokens of all that is not the visible answer", examples=[43])


class UsageInfo(Shown):
    """Tokens, summed over both turns: what the engine computed or found in its cache."""

    prompt_tokens: int = Field(ge=0, description="tokens of both conversations; the second repeats the first", examples=[249])
    completion_tokens: int = Field(ge=0, description="tokens of both replies", examples=[46])
    total_tokens: int = Field(ge=0, description="their sum", examples=[295])
    prompt_tokens_details: PromptDetails = Field(description="parts of the prompt tokens")
    completion_tokens_details: CompletionDetails = Field(description="parts of the completion tokens")
    turns: list[TurnUsage] = Field(description="turn by turn")

    @classmethod
    def of(cls, result: Result) -> UsageInfo:
        """Sum up the turns of a result."""
        usages = [turn.generation.usage for turn in result.turns]
        prompt, completion = sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages)
        formula = sum(turn.image_tokens_formula for turn in result.turns if turn.generation.usage.image_tokens is None)
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptDetails(
                cached_tokens=sum(u.cached_tokens or 0 for u in usages),
                image_tokens=formula + sum(u.image_tokens or 0 for u in usages),
            ),
            completion_tokens_details=CompletionDetails(reasoning_tokens=max(0, completion - result.answer_tokens)),
            turns=[TurnUsage.of(turn) for turn in result.turns],
        )


class Timings(Shown):
    """Milliseconds. What is decoded while bytes arrive or beside the zoom turn overlaps, so stages can exceed the total."""

    receive_ms: float = Field(
        ge=0, description="milliseconds until the whole request was read, and a remote image fetched", examples=[8.056]
    )
    decode_ms: float = Field(
        ge=0,
        description="milliseconds of decoding it as a whole, beside the zoom turn; 0 where only what is needed was decoded",
        examples=[23.436],
    )
    overview_ms: float = Field(
        ge=0,
        description="milliseconds from the last byte to the overview; next to nothing if it was made on the way",
        examples=[4.66],
    )
    zoom_turn_ms: float = Field(ge=0, description="milliseconds of the zoom turn on the engine; 0 without", examples=[155.238])
    crop_ms: float = Field(ge=0, description="milliseconds of cutting and encoding the crop; 0 without", examples=[2.664])
    answer_turn_ms: float = Field(ge=0, description="milliseconds of the answer turn on the engine", examples=[72.401])
    total_ms: float = Field(ge=0, description="milliseconds from the first byte to the answer", examples=[258.839])

    @classmethod
    def of(cls, timings: dict[str, float]) -> Timings:
        """Show seconds as milliseconds.

        Args:
            timings: seconds by stage.
        """
        stages = ("receive", "decode", "overview", "zoom_turn", "crop", "answer_turn")
        shown = {f"{stage}_ms": round(1000 * timings.get(stage, 0.0), 3) for stage in stages}
        total = timings.get("receive", 0.0) + timings["total"]
        return cls(total_ms=round(1000 * total, 3), **shown)


class RewardsInfo(Shown):
    """What the paper's training would have given, 0 or 1 each; null where there was no zoom turn to judge."""

    box: float | None = Field(
        ge=0, le=1, description="1 where the region covers at most 0.6 of the image's pixels, else 0", examples=[1.0]
    )
    format: float | None = Field(
        ge=0, le=1, description="1 where both replies are of the right tags, each once and in order", examples=[1.0]
    )

    @classmethod
    def of(cls, result: Result) -> RewardsInfo:
        """Judge a result."""
        if result.region.outcome == "skipped":
            return cls(box=None, format=None)
        first, *_, last = (turn.generation.text for turn in result.turns)
        return cls(box=box_reward(result.region.box, result.header.size), format=format_reward(first, last))


class VqaResponse(Shown):
    """The answer, and how it was found."""

    model_config = ConfigDict(json_schema_extra=only_if_asked("reasoning", "replies", "rewards", "overview"))

    id: str = Field(description="of the answer", examples=[f"vqa-{REQUEST_ID}"])
    object: Literal["vqa"] = Field(default="vqa", description="what this is")
    created: int = Field(description="when: seconds since 1970 (Unix time)", examples=[1795455118])
    model: str = Field(description="who was asked", examples=["ergo"])
    answer: str = Field(description="what was found", examples=["434"])
    choice: int | None = Field(ge=0, description="index of the choice that the answer means, from 0; else null", examples=[0])
    finish_reason: Literal["stop", "length"] = Field(
        description="`length`: it was cut short by max_tokens, or by the server's own bound on a reply", examples=["stop"]
    )
    reasoning: str | None = Field(
        default=None, description="what the model thought before it answered; with include=reasoning", examples=["It reads 434."]
    )
    replies: list[str] | None = Field(
        default=None,
        description="what the model wrote, turn by turn; with include=replies",
        examples=[["<think>It is at the left.</think><zoom>[6, 34, 36, 64]</zoom>", "<answer>434</answer>"]],
    )
    rewards: RewardsInfo | None = Field(
        default=None, description="those of the paper's rewards that need no right answer; with include=rewards"
    )
    overview: ViewInfo | None = Field(default=None, description="the whole image as the model saw it; with include=overview")
    image: ImageInfo = Field(description="the image as it was understood")
    regions: list[RegionInfo] = Field(min_length=1, max_length=1, description="where the model looked closer")
    visual_tokens: VisualTokensInfo = Field(description="what was spent on seeing")
    usage: UsageInfo = Field(description="tokens of all kinds, as the engine counted them")
    timings: Timings = Field(description="where the time went")

    @classmethod
    def of(cls, result: Result, *, model: str, include: list[str]) -> VqaResponse:
        """Show a result."""
        return cls(
            id=f"vqa-{result.id}",
            created=result.created,
            model=model,
            answer=result.answer.text,
            choice=result.choice,
            finish_reason="length" if result.truncated else "stop",
            reasoning=result.answer.reasoning if "reasoning" in include else None,
            overview=ViewInfo.of(result.overview, data=True) if "overview" in include else None,
            replies=[turn.generation.text for turn in result.turns] if "replies" in include else None,
            rewards=RewardsInfo.of(result) if "rewards" in include else None,
            image=ImageInfo.of(result.header),
            regions=[RegionInfo.of(result.region, result.header, crop="crop" in include)],
            visual_tokens=VisualTokensInfo.of(result.visual_tokens),
            usage=UsageInfo.of(result),
            timings=Timings.of(result.timings),
        )


class TextDelta(Shown):
    """A piece of text, as soon as it is certain."""

    text: str = Field(description="follows the pieces before it", examples=["43"])


class VisualTokensEstimate(Shown):
    """What would be spent on seeing."""

    overview: int = Field(ge=0, description="visual tokens of the whole image as the model would see it", examples=[49])
    crop_max: int = Field(ge=0, description="the most visual tokens that a crop can cost; 0 without a zoom turn", examples=[49])
    total_max: int = Field(ge=0, description="their sum", examples=[98])
    baseline: int = Field(ge=1, description="visual tokens that the same model would spend without zoom", examples=[5041])
    saved_ratio_min: float = Field(
        lt=1, description="1 - total_max / baseline, a fraction; negative where zoom could cost more", examples=[0.9806]
    )

    @classmethod
    def of(cls, overview: int, crop: int, baseline: int) -> VisualTokensEstimate:
        """Add up visual tokens."""
        total = overview + crop
        return cls(overview=overview, crop_max=crop, total_max=total, baseline=baseline, saved_ratio_min=1 - total / baseline)


class Estimate(Shown):
    """What a question would cost, from the image's header alone."""

    object: Literal["vqa.estimate"] = Field(default="vqa.estimate", description="what this is")
    model: str = Field(description="who would be asked", examples=["ergo"])
    image: ImageInfo = Field(description="the image as it was understood")
    zoom: bool = Field(description="whether there would be a zoom turn", examples=[True])
    overview: ViewInfo = Field(description="the size at which the whole image would be seen")
    visual_tokens: VisualTokensEstimate = Field(description="what would be spent on seeing")


class ErrorBody(Shown):
    """What was wrong."""

    message: str = Field(description="one sentence for people", examples=["image: a question needs an image"])
    type: str = Field(description="whose fault it is, as OpenAI's clients know it", examples=["invalid_request_error"])
    param: str | None = Field(description="the field at fault, with dots into lists; else null", examples=["choices.1"])
    code: str = Field(description="what it was, for programs; each status lists its codes", examples=["invalid_request"])


class ErrorEnvelope(Shown):
    """Every error of every path."""

    error: ErrorBody = Field(description="what was wrong")


class Health(Shown):
    """The process lives."""

    status: Literal["ok"] = Field(default="ok", description="it answers")


class Readiness(Shown):
    """Whether questions can be answered now."""

    status: Literal["ready", "waiting", "draining"] = Field(
        description="`waiting` for the engine; `draining`: the server is stopping", examples=["ready"]
    )
    engine: str = Field(description="which engine it is", examples=["embedded"])
    detail: str = Field(description="more about that, for people; may be empty", examples=["the server is stopping"])


class ServerVersion(Shown):
    """Which server this is."""

    version: str = Field(description="of ergo-vqa", examples=["0.1.0"])


_IF_ASKED = ("overview", "reasoning", "replies", "rewards")


def dump(model: BaseModel) -> dict[str, Any]:
    """Return the JSON form, without what was not asked for."""
    data = model.model_dump(mode="json")
    return {key: value for key, value in data.items() if not (key in _IF_ASKED and value is None)}
