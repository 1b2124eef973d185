"""What a report says about where its runs come from."""

from collections.abc import Mapping, Sequence

from megatron_vwn.study.compare import Comparison
from megatron_vwn.study.document import Block, Code, Heading, Items, Text
from megatron_vwn.study.events import LoggedRun


def how_it_was_run(comparison: Comparison, runs: Sequence[LoggedRun], study: Mapping, command: str) -> list[Block]:
    """The last section: hardware, versions, commit, clocks and commands, as far as they were recorded."""
    records = [run.record for run in runs if run.record]
    lines = [
        f"{label}: {'; '.join(values)}."
        for label, values in (
            ("Hardware", _distinct(_hardware(record) for record in records)),
            ("Versions", _distinct(_versions(record) for record in records)),
            ("Commit", _distinct(_commit(record.get("commit")) for record in records)),
            ("Clock", _distinct(_clock(run) for run in runs if run.timing)),
        )
        if values
    ]
    blocks: list[Block] = [Heading("How it was run")]
    if not records:
        lines.append("Hardware, versions and commit are not in these folders: vwn-study run records them.")
    blocks.append(Items(tuple(lines)))
    commands = [each for each in (study.get("command"), command) if each]
    blocks.append(Code("\n".join(commands)))
    plain = comparison.variants[comparison.baseline].first.record.get("command")
    if plain:
        blocks += [Text(f"A run of {comparison.baseline}:"), Code(plain)]
    return blocks


def _hardware(record: Mapping) -> str:
    facts = record.get("hardware") or {}
    if not facts:
        return ""
    cores = f", {facts.get('cores')} cores" if facts.get("device") == "cpu" else ""
    return f"{facts.get('name')}{cores}, {facts.get('ranks', 1)} rank(s) per run"


def _versions(record: Mapping) -> str:
    unused = ("cuda",) if (record.get("hardware") or {}).get("device") == "cpu" else ()
    versions = (record.get("versions") or {}).items()
    return ", ".join(f"{name} {version}" for name, version in versions if version and name not in unused)


def _commit(commit: Mapping | None) -> str:
    if not commit:
        return ""
    return commit["hash"] + (" with uncommitted changes" if commit.get("dirty") else "")


def _clock(run: LoggedRun) -> str:
    timing = run.timing
    return (
        f"{run.variant} {', '.join(f'{each * 1e3:.0f}' for each in timing.get('rounds', []))} ms per step in "
        f"{len(timing.get('rounds', []))} short runs, load {timing.get('load_before', 0):.1f} before"
    )


def _distinct(values) -> list[str]:
    return list(dict.fromkeys(value for value in values if value))
