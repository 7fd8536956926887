"""The keys of EasyCL's training and evaluation files, and what each is here."""

METHODS = {
    "ewc": "ewc", "lwf": "lwf", "replay": "replay", "gem": "gem", "lamol": "lamol", "olora": "o_lora",
    "ilora": "i_lora", "ssr": "ssr", "abscl": "abscl", "moe": "moe_lora", "cl_moe": "cl_moe",
    "dynamic_conpet": "dynamic_conpet", "pseudo_replay": "pseudo_replay",
}  # fmt: skip
"""By the name in `use_<name>: true`."""

_SAME = (
    "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "lr_scheduler_type", "warmup_ratio", "warmup_steps", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2",
    "adam_epsilon", "optim", "bf16", "fp16", "deepspeed", "ddp_timeout", "logging_steps", "save_steps", "save_strategy",
    "save_total_limit", "lora_rank", "lora_alpha", "lora_dropout", "report_to", "gradient_checkpointing",
    "dataloader_num_workers", "dataloader_drop_last", "streaming", "packing", "use_cpu",
)  # fmt: skip
TRAIN_KEYS = {
    **{name: name for name in _SAME},
    "finetuning_type": "tuner_type",
    "cutoff_len": "max_length",
    "preprocessing_num_workers": "dataset_num_proc",
    "quantization_bit": "quant_bits",
    "use_rslora": "use_rslora",
}
"""Training keys, and the flag of `swift-cl sft`."""

EVAL_KEYS = {
    "batch_size": "max_batch_size",
    "max_samples": "test_limit",
    "max_new_tokens": "max_tokens",
    "temperature": "temperature",
}
"""Evaluation keys, and the flag of `swift-cl eval`."""

METHOD_KEYS = {
    "ewc_lambda": ("ewc", "ewc_lambda", "EasyCL's penalty has no gradient, so its value tells nothing; tune it"),
    "ewc_num_samples": ("ewc", "ewc_fisher_samples", ""),
    "lwf_temperature": ("lwf", "lwf_temperature", ""),
    "lwf_alpha": ("lwf", "lwf_lambda", "the weight of the distillation beside the task's loss, counted once"),
    "replay_ratio": (
        "replay", "replay_ratio",
        "replayed rows per row of the current task, out of a store; EasyCL's is a share of every earlier task's rows",
    ),
    "gem_memory_strength": ("gem", "gem_margin", ""),
    "orthogonal_lambda": ("o_lora", "o_lora_lambda1", ""),
    "l2_lambda": ("o_lora", "o_lora_lambda2", "the norm is not squared, as in the paper"),
}  # fmt: skip
"""Settings of methods: our method, our flag, and what differs. A key that is a flag of ours is taken as it is."""

REQUIRED_VALUE = {
    "stage": "sft",
    "do_train": True,
    "n_shot": 0,
    "eval_mode": "single",
    "val_size": 0,
    "calculate_cl_metrics": True,
}
"""Keys that can have one value only."""

CHAIN_SETS = dict.fromkeys(
    (
        "current_task_id", "prev_task_id", "previous_task_model", "previous_task_data", "previous_task_dataset",
        "replay_task_list", "adapter_name_or_path", "adapters_save_path", "olora_history_path", "pseudo_samples_dir",
        "ilora_buffer_size", "ema_adapter_path", "abscl_stats_path", "lamol_samples_dir", "resume_from_checkpoint",
        "media_dir",
    ),
    "the chain sets it for every stage",
)  # fmt: skip
NO_EFFECT = {
    "overwrite_cache": "nothing of the kind is cached here",
    "overwrite_output_dir": "a finished stage is kept; --overwrite starts anew",
    "plot_loss": "the report plots the loss",
    "trust_remote_code": "ms-swift loads models that way",
    "lang": "only EasyCL's own benchmarks of knowledge use it",
    "cl_buffer_size": "EasyCL itself never reads it",
}
"""Keys without effect here, and why that changes nothing."""

OWN_TRAIN = ("model_name_or_path", "output_dir", "dataset", "dataset_dir", "seed", "max_samples", "cl_tasks")
OWN_EVAL = ("cl_tasks", "seed")
"""Keys that are read elsewhere (the evaluation is greedy: its seed has nothing to decide)."""

TEMPLATES = {
    "chatml": "chatml", "qwen": "qwen2_5", "qwen2_vl": "qwen2_vl", "qwen3": "qwen3", "llama3": "llama3",
    "baichuan2": "baichuan", "intern2": "internlm2", "gemma": "gemma",
}  # fmt: skip
"""LLaMA-Factory's names of templates, and ms-swift's for the same models."""
