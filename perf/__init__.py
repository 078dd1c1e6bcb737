"""Measures sknet-triton against its competitors: ``python -m perf run`` from the checkout.

Its rooms, from the bottom: `rows` what a row is, `peers` whom we are compared with, `static` what
machine code and plans say, `sweep` how it is measured, `report` what the reports show, `commands`.

A sweep is a list of cases, each carried out by several providers (`perf.sweep.providers`). A
provider is timed only after its result agreed with float64 in the same process
(`perf.sweep.gate`); every case and provider is one row of one CSV (`perf.rows.schema`).
"""
