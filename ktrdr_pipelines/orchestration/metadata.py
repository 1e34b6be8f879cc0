"""What Dagster shows of a series and of each materialization: schema of the columns, counts, times, a sparkline."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import dagster as dg

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.loading.report import Completed, LoadReport

SPARKLINE_POINTS = 48

REPORT, PROBLEM = "report", "problem"
"""Metadata of the observation that each load leaves (`observe_load`)."""

COLUMN_SCHEMA = dg.TableSchema(
    columns=[
        dg.TableColumn(
            "timestamp", "datetime (UTC)", description="The bar's start; a session date at 00:00 for daily and longer.",
            constraints=dg.TableColumnConstraints(nullable=False, unique=True, other=["strictly increasing"]),
        ),
        *(
            dg.TableColumn(
                name, "float", description=text,
                constraints=dg.TableColumnConstraints(nullable=False, other=["finite", "positive", rule]),
            )
            for name, text, rule in (
                ("open", "First price.", "between low and high"),
                ("high", "Highest price.", "not below open, close and low"),
                ("low", "Lowest price.", "not above open, close and high"),
                ("close", "Last price.", "between low and high"),
            )
        ),
        dg.TableColumn(
            "volume", "float", description="As IB sends it; 0 where it has none (noted in the sidecar).",
            constraints=dg.TableColumnConstraints(nullable=False, other=["not negative"]),
        ),
    ]
)  # fmt: skip


def describe_asset(series: Series) -> str:
    """The asset's description in the UI."""
    instrument, timeframe = series.instrument, series.timeframe
    return (
        f"{timeframe.ib_bar_size} bars of {instrument.symbol} ({instrument.sec_type} on {instrument.exchange}, "
        f"{instrument.currency}), {instrument.what_to_show}, {instrument.hours} hours, from Interactive Brokers. "
        f"One CSV, `{series.name}.csv`; each partition is a {timeframe.partition} (UTC). A partition is materialized when "
        "every bar that the exchange calendar expects in it, up to the last complete one, is held or absent at IB."
    )


def describe_partition(
    done: Completed, report: LoadReport, closes: Sequence[float], path: str
) -> dict[str, dg.MetadataValue | int | float | str | bool]:
    """Metadata of one partition's materialization. Request counts are those of the run so far. ``closes``: at most
    `SPARKLINE_POINTS` are drawn."""
    found: dict[str, dg.MetadataValue | int | float | str | bool] = {
        "dagster/row_count": done.rows,
        "dagster/uri": path,
        "unfinished": done.is_unfinished,
        "requests_of_run": report.ib_requests_made,
        "retries_of_run": report.retries,
        "pacing_wait_s_of_run": round(report.pacing_wait_s, 1),
        "retry_wait_s_of_run": round(report.retry_wait_s, 1),
        "proven_empty": done.proven_empty,
        "unexpected_bars": done.unexpected,
    }
    if done.first_open and done.last_open:
        found["first_bar"] = dg.MetadataValue.timestamp(done.first_open)
        found["last_bar"] = dg.MetadataValue.timestamp(done.last_open)
    if len(closes) > 1:
        found["closes"] = dg.MetadataValue.md(draw_sparkline(closes))
    return found


def draw_sparkline(closes: Sequence[float]) -> str:
    """Closing prices as a small picture in Markdown, under 1000 characters so that the UI shows it inline."""
    step = max(1, -(-len(closes) // SPARKLINE_POINTS))
    picked = [float(c) for c in closes[::step]]
    low, high = min(picked), max(picked)
    scale = 18 / (high - low) if high > low else 0.0
    points = " ".join(f"{2 * i},{19 - (value - low) * scale:.0f}" for i, value in enumerate(picked))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * len(picked)}" height="20">'
        f'<polyline points="{points}" fill="none" stroke="#4f43dd"/></svg>'
    )
    return f"![closing prices](data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()})"


def observe_load(key: dg.AssetKey, report: LoadReport) -> dg.AssetObservation:
    """What each load leaves at its end, in the run's records and at the asset: the report, and the first failure if any."""
    problem = {}
    if report.failures:
        error = report.failures[0].error
        problem = {"kind": error.family, "message": error.message, "advice": error.advice, "code": error.code}
    return dg.AssetObservation(
        key,
        description=f"{report.status}: {report.fetched_bars} bars in {report.segments_fetched} requests",
        metadata={REPORT: dg.MetadataValue.json(report.as_dict()), PROBLEM: dg.MetadataValue.json(problem)},
    )
