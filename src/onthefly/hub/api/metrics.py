"""Metrics: which there are, and many series in one answer."""

from __future__ import annotations

import csv
import fnmatch
import io
import time
from collections.abc import Iterator
from typing import Annotated, Any, Self

from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator

from onthefly.errors import UnknownReferenceError
from onthefly.hub import columns
from onthefly.hub.api.common import Here, View
from onthefly.hub.charts import Question, X
from onthefly.store import charts

router = APIRouter(prefix="/stores/{store}", tags=["metrics"])

Name = Annotated[str, Field(max_length=1000)]
BINARY: dict[int | str, dict[str, Any]] = {
    200: {"content": {columns.MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
}


class MetricView(View):
    run: str
    name: str
    points: int
    first_step: int
    last_step: int


class EpochsView(View):
    run: str
    steps: list[float]
    epochs: list[float]


class SeriesBody(BaseModel):
    """What a chart shows; see docs/api.md."""

    model_config = ConfigDict(extra="forbid")

    series: list[tuple[Name, Name]] = Field(min_length=1, max_length=1000, description="Pairs of run and metric.")
    points: int = Field(2000, ge=16, le=20_000)
    x: X = "step"
    low: float | None = Field(None, alias="from", allow_inf_nan=False, ge=-1e15, le=1e15)
    high: float | None = Field(None, alias="to", allow_inf_nan=False, ge=-1e15, le=1e15)
    grid: bool = True
    joined: bool = False

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError("from is behind to")
        if self.points * len(self.series) > 10_000_000:
            raise ValueError("so many points of so many series are too many: ask for fewer of either")
        return self

    def question(self) -> Question:
        pairs = tuple(self.series)
        return Question(pairs, self.points, self.x, self.low, self.high, self.grid, self.joined)


@router.get("/metrics")
def get_metrics(
    store: Here,
    run: Annotated[str | None, Query(max_length=100)] = None,
    name: Annotated[str | None, Query(max_length=1000, description="A pattern, such as `val_*`.")] = None,
) -> list[MetricView]:
    """Every metric of every run, or of one."""
    if run is not None:
        store.client.run(run)
    return [
        MetricView(run=of, name=metric, points=points, first_step=first, last_step=last)
        for (of, metric), (points, first, last) in sorted(charts.spans(store.client.store, run).items())
        if name is None or fnmatch.fnmatchcase(metric, name)
    ]


@router.get("/epochs")
def get_epochs(store: Here) -> list[EpochsView]:
    """For every run of which it is known: steps, and the epoch at each. In between it passes evenly."""
    return [
        EpochsView(run=run, steps=[step for step, _ in line.knots], epochs=[epoch for _, epoch in line.knots])
        for run, line in store.charts.epochs().items()
        if line.knots
    ]


@router.post("/series", response_class=Response, responses=BINARY)
def get_series(store: Here, body: SeriesBody) -> Response:
    """Many series, at about two points a pixel, as columns."""
    began = time.perf_counter()
    question = body.question()
    drawn = store.charts.draw(question)
    content = columns.pack(drawn.columns, {"series": drawn.series, "x": question.x, "grid": question.grid})
    took = {"Server-Timing": f"chart;dur={(time.perf_counter() - began) * 1e3:.2f}"}
    return Response(content, media_type=columns.MEDIA_TYPE, headers=took)


@router.get("/series.csv", response_class=Response, responses={200: {"content": {"text/csv": {}}}})
def get_csv(
    store: Here,
    run: Annotated[list[str], Query(min_length=1, max_length=100)],
    name: Annotated[list[str], Query(max_length=1000)] = [],  # noqa: B006  FastAPI copies it
) -> StreamingResponse:
    """Every point of some metrics of some runs, as CSV."""
    there: list[tuple[str, str]] = []
    for of in dict.fromkeys(run):
        names = store.client.metric_names(store.client.run(of).name)
        if missing := [one for one in name if one not in names and len(run) == 1]:
            raise UnknownReferenceError(f"{of!r} has no metric {missing[0]!r}; it has: {', '.join(names) or 'none'}")
        there += [(of, one) for one in names if not name or one in name]

    def lines() -> Iterator[str]:
        yield "run,name,step,time,value\r\n"
        for of, one in there:
            series = store.client.series(of, one)
            text = io.StringIO()
            writer = csv.writer(text)
            for step, at, value in zip(
                series.steps.tolist(), series.times.tolist(), series.values.tolist(), strict=True
            ):
                writer.writerow((_plain(of), _plain(one), step, repr(at), repr(value)))
                if text.tell() > 1 << 16:
                    yield text.getvalue()
                    text.seek(0)
                    text.truncate()
            yield text.getvalue()

    headers = {"Content-Disposition": 'attachment; filename="metrics.csv"'}
    return StreamingResponse(lines(), media_type="text/csv; charset=utf-8", headers=headers)


def _plain(text: str) -> str:
    """A spreadsheet takes a cell that begins so for a formula."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
