"""What keys of other trainers are called here, or why there is no such key: one table of their names.

In: a name as TRL (with transformers), axolotl or LLaMA-Factory has it. Out: our key and what differs, or the reason why
there is none. The errors of `config_files.py` and `cli.py` look names up in it, and `convert/` reports by it. Names
alone stand here; what becomes of values is in `convert/`.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple


class Foreign(NamedTuple):
    """A key of another trainer."""

    ours: str
    """Our key, or several with " and " between them; empty where there is none."""
    note: str
    """What differs; where there is no key of ours, why."""

    def told(self) -> str:
        """In a sentence that follows the name of the key."""
        if not self.ours:
            return f"no such key here: {self.note}"
        return f"here it is {self.ours}{f' ({self.note})' if self.note else ''}"


_TAKEN: list[tuple[str, str, str]] = [
    # Model.
    ("model_name_or_path base_model model_name model_id pretrained_model_name_or_path", "model.path", ""),
    ("tokenizer_config tokenizer_name tokenizer_name_or_path tokenizer_path", "model.tokenizer", ""),
    ("lora_model_dir adapter_name_or_path", "model.path", "a PEFT folder, whose adapters are trained on"),
    ("reinit_weights train_from_scratch", "model.weights", "random"),
    (
        "bf16 bfloat16 mixed_precision",
        "model.compute_dtype",
        "left out: bfloat16 on accelerators",
    ),
    ("torch_dtype dtype pure_bf16", "model.param_dtype", "of trained weights: float32 or bfloat16"),
    ("load_in_4bit", "model.quantize", "nf4"),
    ("load_in_8bit", "model.quantize", "int8"),
    ("quantization_bit", "model.quantize", "nf4 for 4, int8 for 8"),
    ("bnb_4bit_quant_type quantization_type", "model.quantize", "nf4, or int8"),
    (
        "gradient_checkpointing activation_checkpointing",
        "model.remat",
        "full, attention or none",
    ),
    ("disable_gradient_checkpointing", "model.remat", "none"),
    ("activation_offloading", "model.remat", "offload"),
    (
        "attn_implementation flash_attn attn_impl",
        "model.attention",
        "left out: chosen by devices and rows",
    ),
    # Data.
    (
        "datasets dataset_name train_dataset dataset train_data train_file train_files data_path data_files "
        "dataset_mixture dataset_mixer pretraining_dataset dataset_path train_path",
        "data.train",
        "a path or hub org/name, or a list of {path: ...}",
    ),
    (
        "test_datasets eval_dataset validation_file eval_file eval_data val_data validation_data test_file",
        "data.eval",
        "a path, or paths by name",
    ),
    ("dataset_config", "data.train", "org/name@config"),
    ("dataset_train_split dataset_splits", "data.train", "org/name:split"),
    ("dataset_test_split", "data.eval", "org/name:split"),
    (
        "val_set_size val_size test_split_size",
        "data.eval",
        "rows of their own: another file, or org/name:train[95%:]",
    ),
    ("dataset_text_field text_column text_field field", "data.train.N.columns", "{text: theirs}"),
    ("field_messages", "data.train.N.columns", "{messages: theirs}"),
    ("field_tools", "data.train.N.columns", "{tools: theirs}"),
    ("field_thinking", "data.train.N.keys", "{theirs: reasoning_content}"),
    ("field_instruction", "data.train.N.columns", "{instruction: theirs}"),
    ("field_input", "data.train.N.columns", "{input: theirs}"),
    ("field_output", "data.train.N.columns", "{output: theirs}"),
    ("field_system", "data.train.N.columns", "{system: theirs}"),
    (
        "message_property_mappings message_field_role message_field_content",
        "data.train.N.keys",
        "{theirs: role}; from and value are known",
    ),
    ("message_field_training", "data.train.N.keys", "{theirs: train}"),
    ("ds_type", "data.train.N.path", "the ending of a file says its kind"),
    ("max_length max_seq_length max_seq_len model_max_length sequence_len cutoff_len max_length_tokens block_size "
     "context_length max_packed_sequence_len", "data.seq_len", "tokens of a row"),
    ("sample_packing neat_packing packing_strategy", "data.packing", "examples of a row never see each other"),
    ("truncation_mode excess_length_strategy", "data.overlong", "drop, truncate, truncate_turns, split, ..."),
    ("assistant_only_loss completion_only_loss", "data.train_on", "assistant, the default, trains answers alone"),
    ("train_on_inputs train_on_prompt", "data.train_on", "all; the default trains answers alone"),
    ("mask_history", "data.train_on", "last_turn"),
    ("roles_to_train", "data.train_on", "a list of roles"),
    ("train_on_eos train_on_eot", "data.train_stop", "every, or last"),
    (
        "chat_template_path chat_template_jinja template prompt_template",
        "data.chat_template",
        "a Jinja file, or one of ours; left out: the tokenizer's",
    ),
    ("enable_thinking", "data.chat_template_kwargs", "{enable_thinking: ...}"),
    ("eos_token", "data.set_eos", "true makes the token that ends an answer the eos token"),
    ("dataset_streaming streaming", "data.stream", "needs train.steps"),
    ("buffer_size streaming_multipack_buffer_size pretrain_multipack_buffer_size", "data.shuffle_buffer",
     "of a stream"),
    ("dataset_prepared_path tokenized_path", "data.cache", "left out: in the user's cache"),
    ("interleave_probs", "data.train.N.weight", ""),
    ("mix_strategy", "data.mixture_ends", "with a weight for each source"),
    # Train.
    (
        "per_device_train_batch_size micro_batch_size train_batch_size global_batch_size per_gpu_train_batch_size",
        "train.batch_size",
        "rows per step over all devices",
    ),
    (
        "gradient_accumulation_steps grad_accum grad_accum_steps accumulation_steps accumulate_grad_batches",
        "train.batch_size and train.microbatch_size",
        "accumulation is the first over the second",
    ),
    ("num_train_epochs num_epochs max_epochs n_epochs nb_epochs", "train.epochs", ""),
    ("max_steps num_steps total_steps max_train_steps num_training_steps max_iters", "train.steps", ""),
    (
        "unfrozen_parameters freeze_trainable_layers freeze_trainable_modules freeze_extra_modules trainable_modules",
        "train.only",
        "names, or such as layers\\.(30|31)\\..*",
    ),
    # Optim.
    ("lr max_lr peak_lr lr_max", "optim.learning_rate", ""),
    ("optimizer optim_name optimizer_type optimizer_name", "optim.name",
     "adamw, adamw8bit, muon, ..."),
    (
        "lr_scheduler_type lr_scheduler scheduler scheduler_type lr_schedule",
        "optim.schedule",
        "constant, linear, cosine, wsd",
    ),
    ("warmup num_warmup_steps lr_warmup_steps", "optim.warmup_steps", "or warmup_ratio"),
    ("lr_scheduler_kwargs", "optim.final_ratio and optim.decay_ratio", ""),
    ("cosine_min_lr_ratio min_lr_ratio min_lr_rate min_lr eta_min lr_min", "optim.final_ratio", "a share of the peak"),
    ("max_grad_norm grad_clip gradient_clip_val clip_grad gradient_clipping grad_norm_clip", "optim.clip_norm",
     "null: none"),
    ("adam_beta1 beta_1", "optim.beta1", ""),
    ("adam_beta2 beta_2", "optim.beta2", ""),
    ("betas adam_betas adamw_betas", "optim.beta1 and optim.beta2", ""),
    ("adam_epsilon adam_eps eps adamw_eps", "optim.epsilon", ""),
    ("wd", "optim.weight_decay", "not on norms and biases"),
    ("use_muon", "optim.name", "muon"),
    ("loraplus_lr_ratio", "optim.groups", "{match: lora_b, learning_rate_factor: theirs}"),
    ("lr_groups embedding_lr embedding_lr_scale loraplus_lr_embedding", "optim.groups",
     "{match: ..., learning_rate_factor: ...}, a factor of optim.learning_rate"),
    ("router_aux_loss_coef moe_aux_loss_coef aux_loss_coef", "optim.router_balance", ""),
    # Loss.
    ("label_smoothing_factor", "loss.label_smoothing", ""),
    (
        "neftune_noise_alpha noisy_embedding_alpha neftune",
        "loss.neftune_alpha",
        "by the length of the example",
    ),
    ("loss_type use_dft_loss", "loss.dft", "true; the plain loss is the default"),
    # LoRA.
    ("use_peft adapter finetuning_type peft_config peft lora_config", "lora", "a section with a rank"),
    ("lora_r lora_rank r", "lora.rank", ""),
    ("lora_alpha", "lora.alpha", "left out: twice the rank"),
    ("lora_dropout", "lora.dropout", ""),
    ("lora_target_modules target_modules lora_target lora_targets", "lora.targets",
     "all_linear, attention, or names such as q_proj"),
    ("lora_target_linear", "lora.targets", "all_linear, the default"),
    ("lora_target_parameters target_parameters", "lora.targets", "mlp means experts too"),
    ("lora_rank_pattern", "lora.rank_pattern", ""),
    ("lora_alpha_pattern", "lora.alpha_pattern", ""),
    ("exclude_modules", "lora.exclude", ""),
    ("peft_layers_to_transform layers_to_transform", "lora.targets", "such as layers\\.(0|1|2)\\..*_proj"),
    ("use_rslora peft_use_rslora", "lora.rslora", ""),
    ("use_dora peft_use_dora", "lora.dora", ""),
    # Mesh.
    (
        "tensor_parallel_size tp_size tensor_model_parallel_size tensor_parallel",
        "mesh.tensor",
        "devices that split heads and MLP",
    ),
    (
        "context_parallel_size sequence_parallel_degree sequence_parallel_size cp_size context_parapllel_size "
        "hyper_parallel_cp_size sp_size",
        "mesh.context",
        "devices that split the positions of a row",
    ),
    ("dp_replicate_size dp_replicate", "mesh.data", "devices with copies of the weights"),
    ("dp_shard_size dp_shard", "mesh.fsdp", "left out: all devices that the other axes leave"),
    ("expert_parallel_size expert_model_parallel_size ep_size", "mesh.expert", "devices that split the experts"),
    # Eval, checkpoints, log.
    ("eval_steps evaluation_steps eval_interval val_check_interval eval_every", "eval.every", "in steps"),
    ("evals_per_epoch eval_strategy evaluation_strategy", "eval.every", "in steps; before and after training, always"),
    ("eval_examples max_eval_samples", "eval.examples", ""),
    ("do_eval", "data.eval", "its rows are evaluated"),
    ("generate_samples num_generation_samples", "eval.samples", "questions answered at each evaluation"),
    ("eval_max_new_tokens generation_max_new_tokens", "eval.max_new_tokens", ""),
    ("predict_with_generate", "eval.exact_match", ""),
    ("save_steps save_interval save_every checkpoint_every checkpointing_steps", "checkpoint.every", "in steps"),
    ("saves_per_epoch save_strategy", "checkpoint.every", "in steps; the end is saved always"),
    ("load_best_model_at_end", "checkpoint.export", "best; it needs data.eval"),
    ("early_stopping_patience early_stopping_steps", "eval.patience", "it needs eval.every"),
    ("save_total_limit max_checkpoints keep_checkpoints", "checkpoint.keep", "the best one is kept besides"),
    ("logging_steps log_interval log_every log_every_n_steps logging_interval", "log.every", "in steps"),
    ("report_to use_wandb use_tensorboard use_trackio logger with_tracking", "log.to",
     "tensorboard, wandb, trackio"),
    ("wandb_project trackio_project_name project tracker_project_name", "log.project", ""),
    ("profiler_steps profiler_active_steps enable_torch_profiler", "log.profile_steps", ""),
    ("output_dir out_dir save_dir outdir checkpoint_dir", "run_dir", ""),
    ("run_name wandb_name trackio_run_name experiment_name wandb_run_name exp_name", "run_dir",
     "its last part is the run's name"),
]  # fmt: skip
"""Names, our key, what differs."""

_NONE: dict[str, str] = {
    "a run continues by itself when the same command is given again; --restart begins anew":
        "resume_from_checkpoint auto_resume_from_checkpoints overwrite_output_dir ignore_data_skip resume "
        "restore_callback_states_from_checkpoint",
    "a command says what is done: train, evaluate, preview, chat":
        "do_train do_predict debug is_preprocess lm_eval_post_train task stage_name",
    "the best checkpoint is that of the smallest held-out loss; checkpoint.export: best makes it the export of the run":
        "metric_for_best_model greater_is_better save_best_model",
    "eval.patience counts evaluations without a smaller loss, however much smaller it is":
        "early_stopping_threshold",
    "checkpoints hold what a run needs to go on; the model alone is RUN/export, or `export RUN --step N`":
        "save_only_model save_first_step save_on_each_node dynamic_checkpoint enable_jit_checkpoint save_safetensors",
    "a run sends nothing to the hub; `run.py push RUN ORG/NAME` does when it is finished":
        "push_to_hub hub_model_id hub_token hub_private_repo hub_strategy hub_always_push hub_revision "
        "hub_model_revision push_dataset_to_hub push_to_hub_model_id push_to_hub_organization push_to_hub_token "
        "hf_use_auth_token export_hub_model_id use_auth_token save_to_hub",
    "log in by the program or the environment of the hub or tracker; a config holds no secrets":
        "hf_token huggingface_token huggingface_hub_token wandb_api_key wandb_key api_key token hf_hub_token "
        "ms_hub_token om_hub_token wandb_entity wandb_run_id wandb_mode wandb_watch wandb_log_model "
        "trackio_space_id trackio_bucket_id trackio_static_space_id wandb_run_group",
    "of trackers there are tensorboard, wandb and trackio (log.to); metrics.jsonl can be sent to others":
        "use_mlflow mlflow_tracking_uri mlflow_experiment_name mlflow_run_name hf_mlflow_log_artifacts use_comet "
        "comet_api_key comet_workspace comet_project_name comet_experiment_key comet_mode comet_online "
        "comet_experiment_config use_otel_metrics otel_metrics_host otel_metrics_port use_swanlab swanlab_project "
        "swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir swanlab_lark_webhook_url "
        "swanlab_lark_secret swanlab_experiment_name swanlab_description swanlab_log_model swanlab_web_host "
        "swanlab_api_host swanlab_log_completions swanlab_completion_log_interval swanlab_completion_max_buffer",
    "loss, accuracy, tokens, speed and memory are always logged; RUN/loss.png is the curve":
        "logging_first_step logging_strategy log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen "
        "include_tokens_per_second include_tkps include_effective_tokens_per_second plot_loss compute_accuracy "
        "skip_memory_metrics log_level log_level_replica disable_tqdm logging_dir include_for_metrics "
        "loss_watchdog_threshold loss_watchdog_patience print_param_status",
    "log.profile_steps traces some steps soon after the start":
        "profiler_steps_start profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_repeat "
        "profiler_record_shapes profiler_profile_memory profiler_with_stack profile_modules",
    "held-out rows are evaluated before the first step and after the last, in rows like those of training":
        "eval_on_start eval_delay per_device_eval_batch_size eval_batch_size per_gpu_eval_batch_size "
        "eval_accumulation_steps eval_do_concat_batches eval_use_gather_object batch_eval_metrics "
        "prediction_loss_only eval_packing eval_sample_packing eval_sequence_len bf16_full_eval fp16_full_eval "
        "eval_on_each_dataset eval_num_beams eval_table_size do_causal_lm_eval eval_causal_lm_metrics do_bench_eval "
        "bench_dataset bench_split lm_eval_tasks lm_eval_batch_size lm_eval_model eval_on_end",
    "sample answers are greedy; `chat` has --temperature and --top-p":
        "generation_temperature generation_top_p generation_top_k generation_do_sample generation_prompt_ratio "
        "do_sample temperature top_p top_k num_beams max_new_tokens repetition_penalty length_penalty "
        "skip_special_tokens sample_backend generation_config generation_max_length generation_num_beams",
    "data are prepared once, by all cores, and kept in data.cache":
        "dataset_num_proc dataset_processes preprocessing_num_workers preprocessing_batch_size overwrite_cache "
        "dataset_keep_in_memory dataset_kwargs skip_prepare_dataset num_dataset_shards_to_save preprocess_iterable "
        "data_shared_file_system preprocess_shards num_proc dataset_batch_size preprocessing_only cache_dir "
        "sample_packing_mp_start_method",
    "batches are a function of data, seed and step, and are read ahead":
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_drop_last dataloader_multiprocessing_context dataloader_in_order accelerator_config "
        "remove_unused_columns label_names length_column_name num_workers batching_workers pin_memory",
    "rows are shuffled anew for every epoch by `seed`":
        "shuffle_dataset shuffle_merged_datasets shuffle_before_merging_datasets disable_shuffling data_seed "
        "sample_packing_sequentially curriculum_sampling train_sampling_strategy shuffle",
    "packed rows have hardly any padding; `preview` says how much":
        "group_by_length pad_to_multiple_of pad_to_sequence_len padding_free batch_flattening "
        "sample_packing_group_size sample_packing_bin_size sample_packing_eff_est sample_packing_seq_len_multiplier "
        "multipack_real_batches pretrain_multipack_attn pretraining_sample_concatenation total_num_tokens "
        "total_supervised_tokens batching_strategy padding_side ignore_pad_token_for_loss use_packed_sequences "
        "multipack_attn",
    "to use a part, cut the file, or name a part of a hub dataset as org/name:train[:1000]":
        "max_samples max_train_samples dataset_shard_num dataset_shard_idx shards shards_idx min_sample_len "
        "max_prompt_len dataset_exact_deduplication max_prompt_length num_samples subset skip",
    "the format of rows is found from their columns (docs/formats.md)":
        "type conversation input_format input_transform dataset_dir format no_input_format system_format ranking "
        "formatting converter field_human field_model model_class file_name",
    "a system text is a row's own: a message of role system, or a column `system`":
        "default_system_message default_system system_prompt drop_system_message",
    "the chat template writes tools and reasoning, and data.train_reasoning says whether it is trained":
        "tool_format preserve_thinking split_thinking template_thinking_key",
    "parts of turns are read from `train_detail` in the rows (docs/formats.md)":
        "message_field_training_detail",
    "tokens that end an answer are found from the chat template and the model folder":
        "eot_tokens pad_token bos_token unk_token role_boundaries",
    "tokens that a template of ours needs are added by data.chat_template; add others to the tokenizer first":
        "special_tokens tokens added_tokens_overrides additional_special_tokens add_tokens add_special_tokens "
        "new_special_tokens_config init_special_tokens resize_vocab resize_token_embeddings_to_32x "
        "mean_resizing_embeddings shrink_embeddings fix_untrained_tokens embeddings_skip_upcast init_config",
    "text of users that spells a control token stays text (data.control_tokens)":
        "split_special_tokens",
    "the newest revision is read; download another with `hf download --revision` and give its folder":
        "model_revision revision_of_model revision",
    "code that comes with a model is never run; docs/models.md lists the families that are known":
        "trust_remote_code custom_model trainer_cls",
    "the family is read from the model's config.json (docs/models.md lists them)":
        "type_of_model model_type cls_model_config base_model_config is_falcon_derived_model is_llama_derived_model "
        "is_mistral_derived_model is_qwen_derived_model",
    "sizes, rope and router are read from the model's config.json; change a copy of it":
        "rope_scaling model_config overrides_of_model_config model_kwargs overrides_of_model_kwargs model_init_kwargs "
        "config_overrides rope_theta config_name use_cache use_kv_cache llama4_linearized_experts mixture_of_depths "
        "model_args",
    "the tokenizer is read from its tokenizer.json":
        "tokenizer_type tokenizer_use_fast tokenizer_legacy tokenizer_use_mistral_common tokenizer_save_jinja_files "
        "use_fast_tokenizer use_fast adapter_folder base_model_ignore_patterns",
    "weights go straight to the devices that hold them, in the dtype that is computed in":
        "device_map low_cpu_mem_usage max_memory gpu_memory_limit device world_size offload_folder "
        "experimental_skip_move_to_device quantization_device_map lora_on_cpu qlora_sharded_model_loading use_cpu "
        "no_cuda torch_empty_cache_steps gc_steps gc_collect_steps empty_cache_steps auto_find_batch_size "
        "layer_offloading bnb_4bit_quant_storage move_to_device",
    "attention is computed by one kernel, chosen by devices and rows (model.attention)":
        "flash_attention xformers_attention sdp_attention flex_attention flex_attn_compile_kwargs sage_attention "
        "eager_attention flash_optimum flash_attn_cross_entropy flash_attn_fuse_mlp flash_attn_rms_norm "
        "gemma4_hybrid_attn_impl large_head_attention flash_attn_d512 sdpa_varlen fused_attn_kernel s2_attention "
        "shift_attn scaling_softmax scaling_softmax_factor scaling_softmax_bias heads_k_stride ring_attn_func "
        "use_flash_attention_2 use_flash_attn use_flash_attention cp_mode masked_softmax_fusion block_diag_attn",
    "XLA fuses the step; the loss never holds all logits":
        "use_liger_kernel liger_kernel_config enable_liger_kernel liger_rope liger_rms_norm liger_rms_norm_gated "
        "liger_layer_norm liger_swiglu liger_glu_activation liger_cross_entropy liger_fused_linear_cross_entropy "
        "liger_use_token_scaling cut_cross_entropy chunked_cross_entropy chunked_cross_entropy_num_chunks "
        "lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel tiled_mlp tiled_mlp_num_shards "
        "tiled_mlp_use_original_mlp torch_compile torch_compile_backend torch_compile_mode torch_compile_options "
        "deepcompile use_unsloth use_unsloth_gc use_kernels use_v1_kernels kernel_config experts_implementation "
        "quantize_moe_experts expert_backend nonexpert_quantization moe_grouped_backend moe_dequant_chunk_size "
        "moe_bnb_fast use_scattermoe use_sonicmoe use_dsv4_kernels use_glm_dsa_kernels dsv4_fp8_nonexpert_mode "
        "dsv4_fp8_lora_kernel dsv4_shared_mlp_lora_kernel dsv4_bf16_all dsv4_fp4_grouped_mode gemma4_fp8_nonexpert "
        "gemma4_nf4_nonexpert nvfp4_merge_aware nvfp4_merge_aware_start_step dense_mixer bias_activation_fusion "
        "apply_rope_fusion cross_entropy_loss_fusion moe_grouped_gemm moe_token_dispatcher_type "
        "expert_parallel_backend expert_parallel_num_nvl_bytes expert_parallel_num_rdma_bytes "
        "expert_parallel_token_capacity expert_parallel_fallback_on_unsupported compile use_compile",
    "remat is by name (model.remat); how is not to be chosen":
        "gradient_checkpointing_kwargs activation_checkpointing_kwargs selective_checkpointing use_reentrant_gc "
        "recompute_granularity recompute_method recompute_num_layers use_reentrant",
    "parameters, optimizer and rows are cut over all devices without being asked (mesh.fsdp)":
        "deepspeed fsdp fsdp_config fsdp_version fsdp_final_state_dict_type fsdp_transformer_layer_cls_to_wrap "
        "fsdp_min_num_params ddp ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph "
        "ddp_backend local_rank parallelism_config dist_config use_distributed_optimizer overlap_param_gather "
        "overlap_grad_reduce ignore_bias_buffers average_tokens_across_devices sequence_parallel num_gpus gpus "
        "num_processes hyper_parallel_args use_hyper_parallel strategy accelerator num_devices n_gpu",
    "a run that stands still is ended by itself (train.stall_timeout)":
        "ddp_timeout init_timeout",
    "layers are not cut over devices in stages; mesh.fsdp cuts every layer":
        "pipeline_model_parallel_size virtual_pipeline_model_parallel_size account_for_embedding_in_pipeline_split "
        "account_for_loss_in_pipeline_split pipeline_parallel_size pp_size",
    "the same command starts on every host (docs/launch.md)":
        "use_ray ray_run_name ray_num_workers resources_per_worker ray_init_kwargs master_addr master_port provider "
        "gpu gpu_count node_count volumes secrets branch dockerfile_commands memory timeout memory_preprocess "
        "timeout_preprocess env num_nodes num_machines project_name",
    "float16 is not computed in; bfloat16 has the range of float32 (model.compute_dtype)":
        "fp16 float16 half_precision_backend fp16_opt_level fp16_backend",
    "float32 sums everywhere; matmuls are in model.compute_dtype":
        "tf32 fp32_norms fp32_norm_classes upcast_layernorm upcast_lmhead_output peft_autocast_adapter_dtype fp32 "
        "float32 allow_tf32",
    "8-bit floats are not computed in":
        "fp8 fp8_enable_fsdp_float8_all_gather fp8_backend",
    "frozen weights are quantised by model.quantize (nf4, doubly; or int8) and by nothing else":
        "use_bnb_nested_quant double_quantization quantization_method quantization quant_config bnb_config_kwargs "
        "gptq gptq_groupsize gptq_model_v1 gptq_disable_exllama model_quantization_config "
        "model_quantization_config_kwargs qat use_onebitllms llmcompressor quantization_config bnb_4bit_compute_dtype "
        "bnb_4bit_use_double_quant",
    "the gradient of all tokens of a step is summed in float32 and divided once":
        "calculate_per_token_loss gradient_accumulation_kwargs sync_each_batch",
    "the same seed on the same devices gives the same bits, always":
        "full_determinism deterministic use_deterministic",
    "optimizers are adamw, adamw8bit, adafactor, lion, muon, sgd, schedule_free_adamw (docs/optimizers.md)":
        "optim_args optim_target_modules torchdistx_path adam_epsilon2 adam_beta3 dion_lr dion_momentum "
        "dion_rank_fraction dion_rank_multiple_of qgalore_rank qgalore_update_proj_gap qgalore_scale "
        "qgalore_proj_type qgalore_proj_quant qgalore_proj_bits qgalore_proj_group_size qgalore_cos_threshold "
        "qgalore_gamma_proj qgalore_queue_size use_galore galore_target galore_rank galore_update_interval "
        "galore_scale galore_proj_type galore_layerwise use_apollo apollo_target apollo_rank apollo_update_interval "
        "apollo_scale apollo_proj apollo_proj_type apollo_scale_type apollo_layerwise apollo_scale_front use_badam "
        "badam_mode badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio badam_mask_mode "
        "badam_verbose use_adam_mini optim_config nesterov ns_steps adjust_lr_fn lisa_n_layers lisa_step_interval "
        "lisa_layers_attribute grokfast_alpha grokfast_lamb adafactor",
    "schedules are constant, linear, cosine and wsd, after a linear warm-up":
        "lr_quadratic_warmup cosine_constant_lr_ratio lr_div_factor jagged_restart_steps jagged_restart_warmup_steps "
        "jagged_restart_anneal_steps relora relora_prune_ratio relora_prune_method relora_cpu_offload relora_steps "
        "lr_scheduler_args num_cycles",
    "adapters are LoRA, rsLoRA and DoRA, A uniform and B zero (docs/lora.md)":
        "peft_init_lora_weights init_lora_weights loftq_config pissa_init pissa_iter pissa_convert "
        "peft_layer_replication peft_layers_pattern lora_fan_in_fan_out fan_in_fan_out create_new_adapter "
        "use_llama_pro module_dropout oft_rank oft_block_size oft_target lora_task_type lora_bias bias task_type mora "
        "peft_ensure_weight_tying spectrum_top_fraction spectrum_model_name layers_pattern",
    "with adapters nothing else is trained; embed_tokens and lm_head can have adapters (lora.targets)":
        "lora_modules_to_save modules_to_save additional_target peft_trainable_token_indices trainable_token_indices",
    "`export RUN --merge-lora` writes the merged model":
        "merge_lora merge_method export_dir export_size export_device export_legacy_format export_quantization_bit "
        "export_quantization_dataset export_quantization_nsamples export_quantization_maxlen export_hf_on_finish "
        "merge_adapter",
    "images, audio and video are not trained on":
        "processor_type processor_kwargs image_size image_resize_algorithm freeze_mm_modules freeze_vision_tower "
        "freeze_multi_modal_projector freeze_language_model image_max_pixels image_min_pixels image_do_pan_and_scan "
        "crop_to_patches video_max_pixels video_min_pixels video_fps video_maxlen use_audio_in_video "
        "audio_sampling_rate media_dir",
    "losses are the plain one, label smoothing, z-loss and dft (docs/losses.md)":
        "use_asft_loss asft_alpha use_eaft_loss eaft_alpha use_eaft eaft_k compute_loss_func chunked_nll",
    "rewards, preferences, distillation and diffusion are not trained here; supervised fine-tuning alone":
        "rl trl vllm ebft reward_model process_reward_model center_rewards_coefficient num_labels dpo_use_weighting "
        "dpo_label_smoothing precompute_ref_log_probs dpo_use_liger_kernel dpo_padding_free dpo_loss_type "
        "dpo_loss_weights orpo_alpha simpo_gamma cpo_alpha kto_desirable_weight kto_undesirable_weight rl_beta "
        "dpo_beta dpo_use_logits_to_keep dpo_generate_during_eval dpo_norm_loss rpo_alpha beta stage pref_beta "
        "pref_ftx pref_bco_weight pref_loss kto_chosen_weight kto_rejected_weight ppo_buffer_size ppo_epochs "
        "ppo_score_norm ppo_target ppo_whiten_rewards ref_model ref_model_adapters ref_model_quantization_bit "
        "reward_model_adapters reward_model_quantization_bit reward_model_type ld_alpha diffusion kd_trainer "
        "kd_ce_alpha kd_alpha kd_temperature kd_beta kd_normalize_topk kd_online_server_base_url kd_online_topk "
        "kd_online_server kd_online_timeout kd_temperature_min logprobs_field field_chosen field_rejected "
        "field_prompt field_label field_completion prompt_format chosen_format rejected_format completion_format "
        "step_separator max_completion_length train_on_last_step_only nemo_gym_enabled nemo_gym_dir "
        "nemo_gym_auto_clone nemo_gym_config_paths nemo_gym_head_port nemo_gym_server_timeout nemo_gym_verify_timeout "
        "nemo_gym_run_timeout nemo_gym_datasets nemo_gym_auto_start nemo_gym_model_name nemo_gym_multi_turn "
        "nemo_gym_max_turns hatchery",
    "long contexts are trained as rows of that length":
        "use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks",
    "answers are made by `chat` and at evaluations; exports are opened by others' servers":
        "gradio_title gradio_share gradio_server_name gradio_server_port gradio_max_new_tokens gradio_temperature "
        "infer_backend infer_dtype vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config "
        "sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend",
    "other engines are not used":
        "use_mca use_megatron_bridge megatron_bridge_args use_kt kt_cpu_activation kt_weight_path "
        "kt_non_expert_weight_path kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num "
        "kt_lora_expert_intermediate_size kt_config megatron_pretrained_checkpoint extra_config",
    "nothing is extended by plug-ins; a config has no switch for that":
        "plugins strict capabilities env_capabilities axolotl_config_path callbacks accelerate_config",
}  # fmt: skip
"""Why there is no such key -> names."""


def _table() -> dict[str, Foreign]:
    """All names. That none stands twice is tested."""
    entries = [(name, Foreign(ours, note)) for names, ours, note in _TAKEN for name in names.split()]
    entries += [(name, Foreign("", reason)) for reason, names in _NONE.items() for name in names.split()]
    return dict(entries)


FOREIGN = _table()
"""Name of others -> what it is here."""

SAME = frozenset(
    [
        "seed",
        "learning_rate",
        "weight_decay",
        "warmup_steps",
        "warmup_ratio",
        "packing",
        "batch_size",
        "chat_template",
        "chat_template_kwargs",
        "roles",
        "path",
        "name",
        "split",
        "columns",
        "weight",
        "fraction",
        "epochs",
        "optim",
        "keep",
        "samples",
        "model",
        "label_smoothing",
    ]
)
"""Names of others that are also names of ours, somewhere in the config, so that an error needs no table for them."""

COMMANDS: dict[str, str] = {
    "sft": "train CONFIG",
    "finetune": "train CONFIG",
    "fine-tune": "train CONFIG",
    "run": "train CONFIG",
    "fit": "train CONFIG",
    "resume": "train CONFIG",
    "preprocess": "preview CONFIG",
    "eval": "evaluate CONFIG",
    "test": "evaluate CONFIG",
    "inference": "chat RUN/export",
    "generate": "chat RUN/export",
    "webchat": "chat RUN/export",
    "infer": "chat RUN/export",
    "merge-lora": "export RUN --merge-lora",
    "merge_lora": "export RUN --merge-lora",
    "merge": "export RUN --merge-lora",
    "env": "doctor",
    "info": "doctor",
    "help": "--help",
    "config": "keys",
    "import": "convert FILE",
}
"""Commands of other trainers -> ours."""

OTHER_METHODS = frozenset(
    ["dpo", "grpo", "kto", "rloo", "reward", "ppo", "orpo", "simpo", "gkd", "rm", "bco", "cpo", "distillation"]
)
"""Commands and stages of other trainers that are no supervised fine-tuning."""


def of_others(key: str) -> Foreign | None:
    """What a key is here by its last part, as others write it (`optim.lr`, `--max-seq-length`); None: not known."""
    return FOREIGN.get(key.rsplit(".", 1)[-1].lstrip("-").replace("-", "_").lower())


_SECRET = re.compile(r"secret|passw|credential|api_?key|access_?key|(^|_)auth(_|$)|(^|_)tokens?$|(^|_)key$")
_OF_TEXT = re.compile(
    r"(eos|bos|pad|eot|unk|sep|cls|mask|image|special|added|additional_special|stop|max.*|num)_tokens?"
)

"""Names that sound like those of secrets, and are of texts."""


def is_secret(name: str) -> bool:
    """Whether a key's value may be a token or a password, by its name; such a value is never shown."""
    name = name.replace("-", "_").lower()
    return (
        bool(_SECRET.search(name)) and not _OF_TEXT.fullmatch(name) and name not in ("tokens", "template_thinking_key")
    )


def looks_foreign(tree: Mapping[str, Any]) -> bool:
    """Whether a file is another trainer's config: it has keys of theirs, and no section of ours."""
    ours = ("model", "data", "train", "optim", "lora", "loss", "mesh", "eval", "log", "checkpoint")
    if any(isinstance(tree.get(section), dict) for section in ours):
        return False
    return len([name for name in tree if name in FOREIGN]) >= 2
