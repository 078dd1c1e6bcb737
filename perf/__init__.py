"""Measures sknet-triton against its competitors: ``python -m perf run`` from the checkout.

A sweep is a list of cases (`perf.rows.cases`), each carried out by several providers
(`perf.sweep.providers`). A provider is timed only after its result agreed with float64 in the same
process (`perf.sweep.gate`); every case and provider is one row of one CSV (`perf.rows.schema`).
"""
