"""How rows are measured: presets, workloads, providers, the gate, the clocks, the sweep."""
