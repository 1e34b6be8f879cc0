"""Dagster's side: partitions, assets, checks, resources, running loads. The only code that imports dagster."""
