"""Fine-tuning: which parameters move, adapters beside frozen ones, and the proof that nothing else moved."""
