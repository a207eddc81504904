"""The table on the terminal."""

from __future__ import annotations

from sparsekd.evaluation.table import metrics_table


def test_systems_stand_in_order_and_absent_figures_are_dashes() -> None:
    measured = {"nDCG@10": 0.123456, "RR@10": 1.0, "R@100": 0.5}
    sparse = {"query_active_dims": 12.34, "passage_active_dims": 1234.56, "FLOPS": 0.0042}
    order = ["bm25", "teacher:a", "teacher:z", "student:untrained", "student:round-1", "student:round-2", "student", "other"]

    table = metrics_table({"systems": {name: {**measured, **(sparse if "student" in name else {})} for name in sorted(order)}})

    lines = table.split("\n")
    assert lines[0].split() == ["system", "nDCG@10", "RR@10", "R@100", "query_active_dims", "passage_active_dims", "FLOPS"]
    assert [line.split()[0] for line in lines[1:]] == order
    assert lines[1].split()[1:] == ["0.1235", "1.0000", "0.5000", "-", "-", "-"]
    assert lines[5].split()[1:] == ["0.1235", "1.0000", "0.5000", "12.3", "1234.6", "0.004"]
    assert len({len(line) for line in lines}) == 1


def test_no_systems_leave_the_header() -> None:
    assert metrics_table({"systems": {}}).startswith("system  nDCG@10")
