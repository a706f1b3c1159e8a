"""What else people call an option, and what to say of words that are no option's.

Flags, YAML keys and environment variables all come here.
"""

from __future__ import annotations

# An option or a flag of several commands, with underscores -> its other names: short ones, and
# Megatron-LM's.
ALSO = {
    "tensor_model_parallel_size": ("tp",),
    "pipeline_model_parallel_size": ("pp",),
    "context_parallel_size": ("cp",),
    "num_virtual_stages_per_pipeline_rank": ("vp",),
    "expert_model_parallel_size": ("ep",),
    "expert_tensor_parallel_size": ("etp",),
    "decoder_first_pipeline_num_layers": ("first_stage_layers",),
}
_KEYS = {other: name for name, others in ALSO.items() for other in others}

PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # options -> dtypes


def key_of(word: str) -> str:
    """The option's own name of a flag's or a key's, with underscores."""
    word = word.removeprefix("--").replace("-", "_")
    return _KEYS.get(word, word)


def flags_of(name: str) -> tuple[str, ...]:
    """`tp` or `tensor_model_parallel_size` -> `--tp`, `--tensor-model-parallel-size`: the name that
    is asked for comes first."""
    names = {name: 0, key_of(name): 0, **dict.fromkeys(ALSO.get(key_of(name), ()))}
    return tuple(f"--{one.replace('_', '-')}" for one in names)


def dtype_of(word: str) -> str:
    """`bf16` -> `bfloat16`; another word as it is."""
    return PRECISIONS.get(word, word)


# ---- words that are no option's ------------------------------------------------------------------

# Options of other programs -> the option here that says the same.
_SAME_AS = {
    "num-train-epochs": "epochs num_epochs max_epochs n_epochs num_train_epoch",
    "train-iters": "max_steps num_train_steps total_steps iters num_steps",
    "lr": "learning_rate", "vit-lr": "vit_learning_rate", "merger-lr": "aligner_lr projector_lr",
    "lr-warmup-iters": "warmup_steps num_warmup_steps", "lr-warmup-fraction": "warmup_ratio",
    "lr-decay-style": "lr_scheduler_type lr_scheduler",
    "seq-length": "max_length max_seq_length cutoff_len model_max_length seq_len max_seq_len",
    "save": "output_dir save_dir", "valid-data-path": "val_dataset eval_dataset valid_data",
    "save-interval": "save_steps", "eval-interval": "eval_steps evaluation_steps",
    "save-best": "metric_for_best_model best_metric save_best_model",
    "early-stop": "early_stopping_patience early_stopping early_stop_patience patience",
    "log-interval": "logging_steps log_every", "clip-grad": "max_grad_norm gradient_clipping",
    "attention-backend": "attn_impl attn_implementation flash_attn use_flash_attn enable_fa2",
    "num-workers": "dataloader_num_workers preprocessing_num_workers",
    "freeze-vit": "freeze_vision_tower freeze_vision_model fix_vit",
    "freeze-llm": "freeze_language_model",
    "moe-aux-loss-coeff": "router_aux_loss_coef aux_loss_coef moe_aux_loss_coef aux_loss_coeff",
    "moe-z-loss-coeff": "router_z_loss_coef moe_z_loss_coef z_loss_coeff",
    "moe-expert-capacity-factor": "expert_capacity_factor capacity_factor moe_capacity_factor",
    "lora-rank": "lora_r", "lora-target": "lora_target_modules target_modules",
    "adapter": "adapters adapter_name_or_path resume_from_adapter",
    "freeze-merger": "freeze_aligner freeze_projector freeze_multi_modal_projector",
}
# What to say of others.
_SAYS = {
    "LoRA is the only kind of adapter that is trained; give lora-rank":
        "lora use_lora use_dora finetuning_type train_type tuner_type peft_type",
    "quantize-base nf4 or int8 keeps the weights beside an adapter in 4 or 8 bits a value":
        "quantization quantization_bit quant_bits load_in_4bit load_in_8bit qlora",
    "there is neither DeepSpeed nor FSDP here; use-distributed-optimizer shares the optimizer's "
    "state over data ranks, as ZeRO 1 does, and tp and pp cut the model":
        "deepspeed zero_stage zero fsdp fsdp_config use_torch_fsdp2 use_megatron_fsdp "
        "data_parallel_sharding_strategy",
    "TransformerEngine has left it; tp-comm-overlap-ag and tp-comm-overlap-rs say the same":
        "tp_comm_split_ag tp_comm_split_rs tp_comm_atomic_ag tp_comm_atomic_rs",
    "give no-tp-comm-overlap-ag": "disable_tp_comm_overlap_ag",
    "give no-tp-comm-overlap-rs": "disable_tp_comm_overlap_rs",
    "give no-tp-comm-bulk-dgrad": "disable_tp_comm_bulk_dgrad",
    "give no-tp-comm-bulk-wgrad": "disable_tp_comm_bulk_wgrad",
    "the experts are what config.json says": "num_experts moe_router_topk moe_ffn_hidden_size",
    "training is supervised here, without preference or reinforcement learning":
        "rlhf_type dpo grpo kto reward_model pref_beta",
    "the model is what config.json says":
        "num_layers hidden_size num_attention_heads num_query_groups ffn_hidden_size patch_size "
        "max_position_embeddings rotary_base normalization vocab_size padded_vocab_size swiglu "
        "position_embedding_type disable_bias_linear untie_embeddings_and_output_weights "
        "use_rotary_position_embeddings group_query_attention",
    "give load the model's Hugging Face directory":
        "model model_name_or_path model_id_or_path model_path pretrained_checkpoint",
    "the tokenizer comes with the checkpoint; hf-config names another directory of it":
        "tokenizer_model tokenizer_type tokenizer tokenizer_name_or_path processor_path",
    "the chat template is the tokenizer's own, chat_template.jinja beside it":
        "template prompt_template chat_template",
    "give train-data-path a dataset that megatron-vl prepare made":
        "dataset datasets data_path dataset_dir train_data data",
    "give save-best, eval_loss or eval_exact: the best checkpoint is kept beside the newest, and "
    "the end of the run says how to convert it": "load_best_model_at_end",
    "save-best knows which way is better": "greater_is_better",
    "give early-stop; every better validation counts, however little better it is":
        "early_stopping_threshold",
    "data are always streamed from their shards": "streaming dataset_streaming",
    "give bf16, fp16 or fp32": "dtype torch_dtype params_dtype precision mixed_precision",
    "these models are trained without dropout": "attention_dropout hidden_dropout dropout",
    "the data-parallel size is what processes are left over, processes / (tp x pp x cp)":
        "data_parallel_size dp dp_size",
    "the machine decides, NCCL on GPUs and gloo on a CPU": "distributed_backend ddp_backend",
    "the batch stays as large as it is; give global-batch-size": "rampup_batch_size",
    "schedules count steps; give lr-decay-iters": "lr_decay_samples",
    "schedules count steps; give lr-warmup-iters or lr-warmup-fraction": "lr_warmup_samples",
    "weight decay stays as it is; give weight-decay":
        "weight_decay_incr_style start_weight_decay end_weight_decay",
    "layers are Megatron-Core's, with TransformerEngine's where it and a CUDA device are":
        "transformer_impl use_mcore_models use_legacy_models spec",
    "data are read by energon": "dataloader_type",
    "the vocabulary is padded to a multiple of tp": "make_vocab_size_divisible_by",
    "the flag --layout auto of megatron-vl train chooses the layout": "layout auto_layout",
    "the flag --gpu of megatron-vl train names the card": "gpu gpu_name gpu_type card",
    "see fused-ops": "gradient_accumulation_fusion no_gradient_accumulation_fusion "
        "bias_swiglu_fusion no_bias_swiglu_fusion bias_gelu_fusion no_bias_gelu_fusion "
        "rope_fusion no_rope_fusion masked_softmax_fusion no_masked_softmax_fusion",
    "a dataset is split when it is prepared: megatron-vl prepare": "split",
    "give micro-batch-size, rows of a forward pass, and global-batch-size, rows of a step":
        "per_device_train_batch_size batch_size train_batch_size",
    "give global-batch-size, which is micro-batch-size x data-parallel ranks x accumulation":
        "gradient_accumulation_steps gradient_accumulation",
    "samples are packed, and with packing-buffer-size 0 they are not":
        "packing sample_packing padding_free neat_packing",
    "give recompute-granularity, selective or full":
        "gradient_checkpointing recompute_activations activation_checkpointing",
    "a run goes on by itself from what save holds; give the same command again":
        "resume_from_checkpoint resume",
    "give wandb-project, swanlab-project, mlflow-experiment or tensorboard-dir": "report_to",
    "the optimizer is AdamW; see adam-beta1 and its neighbours": "optim optimizer",
    "give image-max-pixels or video-max-pixels": "max_pixels",
    "give image-min-pixels or video-min-pixels": "min_pixels",
}
ANSWERS = {
    **{word: f"use {option}" for option, words in _SAME_AS.items() for word in words.split()},
    **{word: says for says, words in _SAYS.items() for word in words.split()},
}


def answer(word: str) -> str:
    """What to say of a flag, key or variable that is no option's, `--lora-rank` or `lora_rank`;
    empty where nothing better is known than the nearest spelling."""
    key = word.removeprefix("--").replace("-", "_").lower()
    return ANSWERS.get(key) or ANSWERS.get(key.removeprefix("no_"), "")
