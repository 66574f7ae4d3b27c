"""The wire forms of ``/v1/vqa``, and nothing but forms. Lengths are pixels, times milliseconds, ratios fractions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from ergo_server.imaging.geometry import MAX_VISUAL_TOKENS, MIN_VISUAL_TOKENS
from ergo_server.imaging.header import ImageHeader
from ergo_server.imaging.view import View
from ergo_server.pipeline import RegionReport, Result, Turn, VisualTokens

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Form(BaseModel):
    """The fields of a request about an image; the image is kept apart. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")

    max_visual_tokens: int | None = Field(
        default=None, ge=MIN_VISUAL_TOKENS, le=MAX_VISUAL_TOKENS, description="pixel budget of each view; unset takes the model's"
    )

    @property
    def texts(self) -> list[str]:
        """What the model is given to read."""
        return []


class VqaFields(Form):
    """A question, whatever the form of the body it came in; the image is kept apart."""

    question: Text = Field(description="what to find out")
    choices: list[Text] = Field(default=[], max_length=26, description="options, shown to the model in the answer turn only")
    instructions: str = Field(default="", description="how to answer, shown in the answer turn only")
    model: str = Field(default="ergo", description="`ergo` zooms, `ergo-single` does not")
    max_tokens: int | None = Field(default=None, ge=1, description="bounds the visible answer; the thinking is not counted")
    temperature: float = Field(default=0.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    zoom: Literal["auto", "always", "never"] = Field(
        default="auto", description="`auto` leaves the zoom turn out when the image fits the budget at full resolution"
    )
    stream: bool = Field(default=False, description="answer with server-sent events")
    include: list[Literal["overview", "crop", "reasoning", "replies"]] = Field(default=[], description="what else to send back")

    @property
    def texts(self) -> list[str]:
        """What the model is given to read."""
        return [self.question, *self.choices, self.instructions]


class EstimateFields(Form):
    """What an estimate needs beside the image."""

    model: str = "ergo"
    zoom: Literal["auto", "always", "never"] = "auto"


class UploadFields(Form):
    """What an upload needs beside the image: the budget is that of the overview which is kept with it."""


class ImageInfo(BaseModel):
    """The image as it was understood."""

    width: int = Field(description="upright width in pixels")
    height: int = Field(description="upright height in pixels")
    format: str
    orientation: int = Field(description="EXIF orientation, 1 to 8; all coordinates are in the upright frame")
    animated: bool = Field(description="it has more frames than the first, which alone is looked at")

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

    id: str = Field(description="names it in questions")
    object: Literal["image"] = "image"
    bytes: int = Field(description="of the file")
    expires_at: int = Field(description="Unix time at which it is forgotten")
    expires_in: float = Field(description="seconds until then")

    @classmethod
    def stored(cls, id: str, header: ImageHeader, size: int, expires_at: float, expires_in: float) -> StoredImage:
        """Show an uploaded image."""
        info = ImageInfo.of(header).model_dump()
        return cls(**info, id=id, bytes=size, expires_at=int(expires_at), expires_in=round(expires_in, 3))


class ViewInfo(BaseModel):
    """A view: what the model saw."""

    width: int
    height: int
    data: str | None = Field(default=None, description="data: URL of the PNG, with include=overview or include=crop")

    @classmethod
    def of(cls, view: View, *, data: bool) -> ViewInfo:
        """Show a view, with its pixels if asked for."""
        return cls(width=view.size.width, height=view.size.height, data=view.data_url if data else None)


class RegionInfo(BaseModel):
    """What became of the zoom."""

    box: tuple[int, int, int, int] = Field(description="x1, y1, x2, y2 of what was cropped, in upright pixels of the image")
    normalized: tuple[float, float, float, float] = Field(description="the same as fractions of the image")
    seen: tuple[float, float, float, float] | None = Field(description="the box as the model wrote it, in pixels of the overview")
    area_ratio: float = Field(description="area of the box by that of the image")
    magnification: float = Field(description="pixels of the crop per pixel of the overview, linear")
    outcome: Literal["zoomed", "clamped", "no_box", "invalid_box", "skipped"]
    reason: str | None = Field(default=None, description="why the zoom was skipped, or the box was not used")
    lenient: bool = Field(default=False, description="the box was read although its form strayed from the trained one")
    crop: ViewInfo | None

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


class VisualTokensInfo(BaseModel):
    """What was spent on seeing."""

    overview: int
    crop: int
    extra: int = Field(description="of other images in the conversation")
    total: int = Field(description="each view once")
    baseline: int = Field(description="what the same model would spend without zoom, at most 16384 an image")
    saved_ratio: float = Field(description="1 - total / baseline; negative where zoom cost more")
    source: Literal["engine", "formula"] = Field(description="who counted")

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


class TurnUsage(BaseModel):
    """Tokens of one turn, as the engine counted them; null where it does not say."""

    turn: Literal["zoom", "answer", "single"]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None
    image_tokens: int | None

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


class PromptDetails(BaseModel):
    """Parts of the prompt tokens, summed over the turns."""

    cached_tokens: int
    image_tokens: int


class CompletionDetails(BaseModel):
    """Parts of the completion tokens."""

    reasoning_tokens: int = Field(description="all that is not the visible answer")


class UsageInfo(BaseModel):
    """Tokens, summed over both turns: what the engine computed or found in its cache."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails
    turns: list[TurnUsage]

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


class Timings(BaseModel):
    """Milliseconds. What is decoded while bytes arrive or beside the zoom turn overlaps, so stages can exceed the total."""

    receive_ms: float = Field(description="until the whole request was read, and a remote image fetched")
    decode_ms: float = Field(description="decoding it as a whole, beside the zoom turn; 0 where only what is needed was decoded")
    overview_ms: float = Field(description="from the last byte to the overview; next to nothing if it was made on the way")
    zoom_turn_ms: float
    crop_ms: float
    answer_turn_ms: float
    total_ms: float

    @classmethod
    def of(cls, timings: dict[str, float], received: float) -> Timings:
        """Show seconds as milliseconds.

        Args:
            timings: seconds by stage.
            received: seconds it took to read the body.
        """
        stages = ("decode", "overview", "zoom_turn", "crop", "answer_turn")
        shown = {f"{stage}_ms": round(1000 * timings.get(stage, 0.0), 3) for stage in stages}
        return cls(receive_ms=round(1000 * received, 3), total_ms=round(1000 * (received + timings["total"]), 3), **shown)


class VqaResponse(BaseModel):
    """The answer, and how it was found."""

    id: str
    object: Literal["vqa"] = "vqa"
    created: int
    model: str
    answer: str
    choice: int | None = Field(description="index of the choice that the answer means")
    finish_reason: Literal["stop", "length"]
    reasoning: str | None = Field(default=None, description="with include=reasoning")
    replies: list[str] | None = Field(default=None, description="what the model wrote, turn by turn, with include=replies")
    overview: ViewInfo | None = Field(default=None, description="the whole image as the model saw it, with include=overview")
    image: ImageInfo
    regions: list[RegionInfo]
    visual_tokens: VisualTokensInfo
    usage: UsageInfo
    timings: Timings

    @classmethod
    def of(cls, result: Result, *, model: str, include: list[str], received: float) -> VqaResponse:
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
            image=ImageInfo.of(result.header),
            regions=[RegionInfo.of(result.region, result.header, crop="crop" in include)],
            visual_tokens=VisualTokensInfo.of(result.visual_tokens),
            usage=UsageInfo.of(result),
            timings=Timings.of(result.timings, received),
        )


class Estimate(BaseModel):
    """What a question would cost, from the image's header alone."""

    object: Literal["vqa.estimate"] = "vqa.estimate"
    model: str
    image: ImageInfo
    zoom: bool = Field(description="whether there would be a zoom turn")
    overview: ViewInfo
    visual_tokens: dict[str, int | float] = Field(
        description="overview; crop_max: the most a crop can cost; total_max; baseline; saved_ratio_min"
    )


class ErrorBody(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorEnvelope(BaseModel):
    """Every error of every path."""

    error: ErrorBody


def dump(model: BaseModel) -> dict[str, Any]:
    """Return the JSON form, without what was not asked for."""
    data = model.model_dump(mode="json")
    return {key: value for key, value in data.items() if not (key in ("overview", "reasoning", "replies") and value is None)}
