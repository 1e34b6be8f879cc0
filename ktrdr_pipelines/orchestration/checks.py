"""Asset checks: is every bar well formed (schema), is every expected bar there (completeness).

They are evaluated by the asset itself, at the end of its run: a separate check would never execute, because the asset
yields no output (docs/dagster_facts.md, 3). The rules are `bars/schema.py`'s and the calendar's.
"""

import dagster as dg

from ktrdr_pipelines.domain.instruments import Series
from ktrdr_pipelines.domain.time import format_instant
from ktrdr_pipelines.errors import DataError
from ktrdr_pipelines.loading.report import LoadReport

SCHEMA_CHECK = "bars_schema"
COMPLETENESS_CHECK = "completeness"
_SHOWN = 20


def specs_for(series: Series, key: dg.AssetKey) -> list[dg.AssetCheckSpec]:
    """The two checks of a series."""
    return [
        dg.AssetCheckSpec(
            SCHEMA_CHECK,
            asset=key,
            description="Every bar of the loaded windows has finite positive prices, a high and low that bound the others, "
            f"a volume that is not negative, and a strictly increasing UTC stamp on the {series.timeframe.name} grid.",
        ),
        dg.AssetCheckSpec(
            COMPLETENESS_CHECK,
            asset=key,
            description="Every bar that the exchange calendar expects in the loaded window, up to the last complete one, "
            "is held, or absent at IB.",
        ),
    ]


def evaluate_checks(key: dg.AssetKey, report: LoadReport) -> list[dg.AssetCheckResult]:
    """The results of both checks for one load of the asset ``key``."""
    return [_evaluate_schema(key, report), _evaluate_completeness(key, report)]


def _evaluate_schema(key: dg.AssetKey, report: LoadReport) -> dg.AssetCheckResult:
    """Failed when IB sent bars that break the rules (they were not written), or the file itself does."""
    broken = [f.error for f in report.failures if isinstance(f.error, DataError)]
    rows = "\n\n".join(f"{error}\n{error.rows}" for error in broken[:_SHOWN])
    return dg.AssetCheckResult(
        asset_key=key,
        check_name=SCHEMA_CHECK,
        passed=not broken,
        severity=dg.AssetCheckSeverity.ERROR,
        description=f"{len(broken)} answers refused" if broken else "All bars are valid.",
        metadata={"refused": len(broken), "bars": report.fetched_bars}
        | ({"rows": dg.MetadataValue.md(f"```\n{rows}\n```")} if rows else {}),
    )


def _evaluate_completeness(key: dg.AssetKey, report: LoadReport) -> dg.AssetCheckResult:
    """Failed when bars of the window are expected and neither held nor confirmed absent."""
    failures = [
        dg.TableRecord({"start": format_instant(f.window.start), "end": format_instant(f.window.end),
                        "why": f.error.observed[:300]})
        for f in report.failures[:_SHOWN]
    ]  # fmt: skip
    complete = report.missing_bars == 0 and not report.failures
    return dg.AssetCheckResult(
        asset_key=key,
        check_name=COMPLETENESS_CHECK,
        passed=complete,
        severity=dg.AssetCheckSeverity.ERROR,
        description=_describe_missing(report, complete),
        metadata={
            "missing_bars": report.missing_bars,
            "proven_empty": report.proven_empty,
            "unexpected_bars": report.unexpected_bars,
        }
        | ({"failed_windows": dg.MetadataValue.table(failures)} if failures else {}),
    )


def _describe_missing(report: LoadReport, complete: bool) -> str:
    if complete:
        return "Nothing is missing."
    if report.missing_bars:
        return f"{report.missing_bars} expected bars are missing."
    return "Not judged: the load could not begin."
