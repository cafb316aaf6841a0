"""Names, registry, gates, ranking, selection and its report."""
