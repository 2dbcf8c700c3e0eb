"""Text corpora and the grain pipelines that turn them into batches."""
