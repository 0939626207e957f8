"""Fine-tuning: which parameters move, adapters beside frozen ones, and the proof that nothing else moved.

Modules, each to be imported by its name:
  presets: rule lists: head only, last layers, BitFit, norms, embeddings frozen, layer-wise and discriminative rates.
  unfreeze: gradual unfreezing as a function of the step.
  statistics: BatchNorm under a frozen module.
  contract: hashes of all that is frozen.
  adapters, lora, bottleneck, prompts: parameters beside a frozen model.
  quantize: a frozen base in 8 or 4 bits.
  delta: checkpoints and folders that hold only what moved.
  diff: which leaves of two models differ, and how far.
  distillation, preference: a frozen teacher, a frozen reference.
"""
