"""Names of settings that people bring from TRL, torchtune, Axolotl and LLaMA-Factory, and what they are here.

The hint for a name that is no setting, and what `convert config` does with a key that has no rule of its own: a row
with one of our keys converts it, any other says why it is left out.
"""

ORPO_LAMBDA = "ORPO's lambda is objective.odds_weight, which objective.name=orpo takes"
KTO_LAMBDAS = "KTO's two are objective.desirable_weight and objective.undesirable_weight"
ALPHAS = (
    "RPO's alpha is objective.sft_weight, R-DPO's objective.length_penalty, LD-DPO's objective.ld_alpha, "
    "beta-DPO's objective.adapt, that of a divergence objective.divergence_alpha"
)
FOREIGN = {
    name: answer
    for names, answer in (
        ("model_name_or_path model_name base_model pretrained_model_name_or_path tokenizer", "model.path"),
        ("objective.lambda objective.lambda_ objective.lam", f"{ORPO_LAMBDA}; {KTO_LAMBDAS}"),
        ("objective.alpha", ALPHAS),
        ("objective.lambda_d objective.lambda_desirable", "objective.desirable_weight"),
        ("objective.lambda_u objective.lambda_undesirable", "objective.undesirable_weight"),
        ("objective.epsilon objective.eps", "objective.label_smoothing"),
        ("objective.eta", "SPPO's eta is 1 / objective.beta, of objective.name=sppo_hard"),
        ("objective.rho", "objective.keep_fraction"),
        ("objective.delta", "SLiC's delta is 1 / objective.beta, of objective.name=hinge"),
        ("objective.margin objective.target_margin objective.target_reward_margin", "objective.gamma"),
        ("model.name model.id model.model model.checkpoint", "model.path"),
        ("data.path data.paths data.file data.files data.name data.dataset data.training", "data.train"),
        ("data.validation data.valid data.dev data.test data.evaluation", "data.eval"),
        ("reference.model reference.name", "reference.path"),
        ("bf16 dtype torch_dtype precision mixed_precision", "model.compute_dtype"),
        ("fp16 float16 half", "model.compute_dtype=float16; its loss scale is found by itself"),
        ("gradient_checkpointing activation_checkpointing enable_activation_checkpointing", "model.remat"),
        ("dataset_name dataset train_dataset train_file data_files datasets train_data", "data.train"),
        ("eval_dataset test_datasets eval_file validation_file val_data", "data.eval"),
        ("max_seq_length max_seq_len cutoff_len sequence_len block_size", "data.max_length"),
        (
            "max_prompt_length max_completion_length max_target_length",
            "prompts and answers have no limits of their own: data.max_length is that of both together",
        ),
        ("truncation_mode", "data.truncation"),
        ("chat_template chat_template_path prompt_template", "data.template"),
        (
            "enable_thinking template_kwargs",
            "arguments of the template are data.chat_template_kwargs={enable_thinking: false}",
        ),
        ("prompt_column chosen_column rejected_column field_mapping column_mapping", "data.columns"),
        ("template", "the model's own chat template is used; data.template takes a Jinja file with another"),
        (
            "val_set_size eval_split test_split_size val_size validation_split",
            "data.eval_fraction holds out a share of the prompts, data.eval names held-out pairs of their own",
        ),
        ("max_train_samples max_samples", "data.first"),
        ("batch_size train_batch_size global_batch_size", "batch.pairs"),
        (
            "per_device_train_batch_size micro_batch_size",
            "batch.pairs is a whole step: pairs of a device x accumulation x devices",
        ),
        ("loss_type loss rl pref_loss objective_name", "objective.name"),
        ("pref_beta dpo_beta", "objective.beta"),
        ("ref_model reference_model ref_model_name_or_path", "reference.path"),
        ("precompute_ref_log_probs", "reference.mode"),
        ("sync_ref_model ref_model_sync_steps", "reference.update_every"),
        ("ref_model_mixup_alpha", "reference.update_rate"),
        ("rpo_alpha cpo_alpha pref_ftx nll_alpha", "objective.sft_weight"),
        ("f_divergence_type", "objective.divergence"),
        ("f_alpha_divergence_coef", "objective.divergence_alpha"),
        ("use_weighting", "objective.weighting"),
        ("discopop_tau", "objective.tau"),
        ("simpo_gamma gamma_beta_ratio", "objective.gamma"),
        ("orpo_alpha", "objective.odds_weight"),
        ("center_rewards_coefficient", "objective.center"),
        ("loss_weights", "objective as a list of blocks: [{name: sigmoid, weight: 0.8}, {name: sft, weight: 1}]"),
        ("lr peak_lr", "optimizer.learning_rate"),
        ("lr_scheduler_type lr_scheduler scheduler", "optimizer.schedule"),
        ("warmup_ratio num_warmup_ratio", "optimizer.warmup_fraction"),
        ("num_warmup_steps", "optimizer.warmup_steps"),
        ("adam_beta1", "optimizer.beta1"),
        ("adam_beta2", "optimizer.beta2"),
        ("adam_epsilon eps", "optimizer.epsilon"),
        ("max_grad_norm gradient_clipping clip_grad_norm", "optimizer.clip_norm"),
        ("min_lr min_lr_ratio lr_end", "the rate falls to 0 and has no floor; optimizer.schedule=constant keeps it"),
        ("max_steps max_steps_per_epoch", "steps"),
        ("num_train_epochs num_epochs", "epochs"),
        ("data_seed", "seed"),
        ("output_dir", "output"),
        (
            "eval_steps eval_strategy evaluation_strategy eval_epochs eval_interval evals_per_epoch",
            "evaluation.every counts steps (100), or passes over the data ('0.5 epochs')",
        ),
        ("save_steps save_strategy saves_per_epoch", "checkpoint.every"),
        ("save_total_limit", "checkpoint.keep"),
        ("logging_steps log_every_n_steps", "log.every"),
        ("report_to metric_logger", "log.loggers"),
        ("tensor_parallel tensor_parallel_size", "mesh.tensor"),
        ("data_parallel data_parallel_size ddp", "mesh.data"),
        ("gradient_accumulation_steps", "not needed: batch.pairs is a whole step, batch.micro_tokens its parts"),
        ("per_device_eval_batch_size", "not needed: evaluation packs its rows as training does"),
        ("packing padding_free sample_packing pad_to_multiple_of", "not needed: rows are always packed"),
        ("attn_implementation flash_attention", "model.attention"),
        ("use_liger_kernel use_liger_loss", "not needed: kernels are chosen here"),
        ("do_train do_eval do_predict", "not needed: this command trains, and evaluates where data.eval is given"),
        (
            "early_stopping_patience early_stopping early_stopping_steps num_patience",
            "evaluation.patience counts evaluations without a better checkpoint.best, and then stops",
        ),
        (
            "load_best_model_at_end metric_for_best_model save_best save_best_model save_best_only monitor best_metric",
            "checkpoint.best=eval_loss (or another metric) keeps and exports the best checkpoint",
        ),
        ("greater_is_better", "not needed: of each metric that checkpoint.best takes it is known which way is better"),
        (
            "early_stopping_threshold",
            "not there: any better value of checkpoint.best counts; evaluation.patience says how long to wait for one",
        ),
        ("run_name wandb_name wandb_run_name", "log.name"),
        ("wandb_project trackio_project mlflow_experiment_name", "log.project"),
        ("wandb_tags run_tags", "log.tags"),
        (
            "wandb_entity wandb_mode mlflow_tracking_uri",
            "the service reads it from the environment: WANDB_ENTITY and so on",
        ),
        (
            "plot_loss",
            "not needed: report.html draws the curves of every run; metrics.jsonl and log.tensorboard have the curves",
        ),
        ("deepspeed fsdp_config accelerator_config", "not needed: the mesh section lays out the devices"),
        ("resume_from_checkpoint overwrite_output_dir", "not needed: a run resumes from its output folder"),
        ("optim optimizer_name", "optimizer.name"),
        ("trust_remote_code", "code of a model folder is never run"),
        ("model_revision base_model_revision", "model.revision"),
        ("ref_model_revision reference_revision", "reference.revision"),
        ("push_to_hub hub_model_id repo_id", "export.push"),
        ("hub_private_repo", "export.private"),
        ("api_key wandb_api_key", "secrets are read from the environment, never from a config"),
        (
            "token hub_token hf_token use_auth_token",
            "the hub's token is read from the environment (HF_TOKEN) or the login of `hf auth login`, not from here",
        ),
        ("lora_r lora_rank r", "adapter.rank"),
        ("lora_alpha", "adapter.alpha"),
        ("lora_dropout", "adapter.dropout"),
        ("lora_target lora_target_modules lora_target_parameters target_modules", "adapter.targets"),
        ("use_rslora", "adapter.rslora"),
        ("use_dora peft_use_dora", "adapter.dora"),
        ("loraplus_lr_ratio", "adapter.lr_ratio"),
        ("lora_modules_to_save", "adapter.modules_to_save"),
        ("lora_layers_to_transform layers_to_transform", "adapter.layers"),
        ("adapter_name_or_path lora_model_dir peft_model_id", "adapter.path"),
        ("use_peft finetuning_type peft_method", "an adapter is trained where adapter.rank says how large it is to be"),
        ("load_in_4bit bnb_4bit_quant_type quantization_bit", "model.quantise=nf4, with adapter.rank, keeps 4 bits"),
        ("load_in_8bit", "model.quantise=int8, with adapter.rank, keeps 8 bits"),
        (
            "use_bnb_nested_quant bnb_4bit_use_double_quant bnb_4bit_compute_dtype",
            "not needed: scales are kept in float32, and products are in model.compute_dtype",
        ),
        ("merge_adapter merge_lora", "export.kind=merged writes the whole model, both writes the adapter as well"),
        # ------------------------------------------------------------------------------------------------ models
        ("router_aux_loss_coef moe_aux_loss_coef aux_loss_coef", "model.router_aux"),
        (
            "model_init_kwargs model_kwargs overrides_of_model_kwargs overrides_of_model_config model_config",
            "a model is what its folder says; model.revision, model.compute_dtype and model.router_aux can be set",
        ),
        (
            "disable_dropout dropout attn_dropout",
            "not needed: nothing of the model is dropped in training; adapter.dropout is that of an adapter",
        ),
        ("activation_offloading enable_activation_offloading", "model.remat=offload keeps less on the device"),
        (
            "gradient_checkpointing_kwargs use_gradient_checkpointing activation_checkpointing_kwargs "
            "use_reentrant_gc use_unsloth_gc selective_checkpointing disable_gradient_checkpointing "
            "layer_offloading ac_mode ac_option",
            "not needed: model.remat says what the backward pass keeps, and finds by itself what fits",
        ),
        (
            "tf32 fp8 fp8_* bf16_full_eval fp16_full_eval infer_dtype float32 upcast_layernorm "
            "upcast_lmhead_output fp32_norms embeddings_skip_upcast bnb_4bit_quant_storage",
            "not needed: model.compute_dtype is that of all products, and sums and log-probabilities are float32",
        ),
        (
            "pure_bf16",
            "optimizer.param_dtype=bfloat16 keeps the weights that are trained in 2 bytes, rounded at random",
        ),
        (
            "flash_attn sdp_attention xformers_attention flex_attention eager_attention sage_attention "
            "s2_attention shift_attn flash_attn_cross_entropy flash_attn_fuse_mlp flash_attn_rms_norm attn_type",
            "not needed: model.attention=auto finds what is fast and right on the device",
        ),
        (
            "torch_compile torch_compile_backend torch_compile_mode torch_compile_options compile use_unsloth "
            "use_kernels enable_liger_kernel liger_kernel_config dpo_use_liger_kernel use_v1_kernels use_cache "
            "use_kv_cache lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel "
            "chunked_cross_entropy cut_cross_entropy tiled_mlp experts_implementation plugins "
            "unsloth_cross_entropy_loss use_onebitllms liger_* quantize_moe_experts use_scattermoe use_sonicmoe "
            "llama4_linearized_experts gemma4_hybrid_attn_impl fused_attn_kernel flex_attn_compile_kwargs "
            "flash_optimum sdpa_varlen use_dsv4_kernels use_glm_dsa_kernels dsv4_* nvfp4_*",
            "not needed: every program is compiled, and kernels are chosen here",
        ),
        (
            "model_type type_of_model cls_model_config base_model_config is_llama_derived_model num_labels "
            "is_mistral_derived_model is_falcon_derived_model is_qwen_derived_model low_cpu_mem_usage "
            "recipe_checkpoint checkpoint_files is_encoder_decoder lora_task_type use_fast_tokenizer "
            "tokenizer_type tokenizer_use_fast tokenizer_legacy merges_file print_param_status "
            "experimental_skip_move_to_device",
            "not needed: the folder of model.path says what the model and its tokenizer are",
        ),
        (
            "tokenizer_name tokenizer_name_or_path tokenizer_config pad_token eos_token padding_value "
            "label_pad_token_id special_tokens tokens added_tokens_overrides add_tokens add_special_tokens "
            "eot_tokens processing_class tokenizer_save_jinja_files tokenizer_use_mistral_common "
            "base_model_ignore_patterns resize_token_embeddings_to_32x shrink_embeddings mean_resizing_embeddings "
            "padding_side fix_untrained_tokens split_special_tokens",
            "the tokenizer is the one in the folder of model.path, with its special tokens; change them there",
        ),
        ("resize_vocab", "model.resize_embedding"),
        (
            "rope_scaling train_from_scratch mixture_of_depths reinit_weights model_max_length neftune_noise_alpha "
            "noisy_embedding_alpha qat quantization gptq bnb_config_kwargs quantization_method "
            "model_quantization_config model_quantization_config_kwargs gptq_* llmcompressor diffusion "
            "double_quantization",
            "not there: weights are used as the folder has them, or as model.quantise keeps them",
        ),
        (
            "processor_type processor_kwargs freeze_vision_tower freeze_language_model video_* image_* "
            "freeze_multi_modal_projector freeze_mm_modules media_dir",
            "only texts are trained on",
        ),
        # -------------------------------------------------------------------------------------------------- data
        ("dataset_num_proc preprocessing_num_workers dataset_processes num_proc", "data.workers"),
        ("shuffle shuffle_dataset shuffle_merged_datasets", "data.shuffle"),
        ("streaming dataset_streaming", "data.stream reads the Parquet files of a hub data set where they lie"),
        (
            "disable_shuffling train_sampling_strategy group_by_length length_column_name curriculum_sampling "
            "shuffle_before_merging_datasets",
            "data.shuffle=false keeps the file's order; pairs are never sorted by length",
        ),
        (
            "dataloader_num_workers dataloader_drop_last dataloader_pin_memory dataloader_persistent_workers "
            "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order "
            "preprocessing_batch_size overwrite_cache dataset_prepared_path dataloader collate_fn streaming_* "
            "pretrain_* tokenized_path cache_dir dataset_keep_in_memory "
            "skip_prepare_dataset buffer_size packed data_shared_file_system num_dataset_shards",
            "not needed: rows are tokenised once and kept (data.cache, data.workers), and every step has all its pairs",
        ),
        (
            "remove_unused_columns no_remove_unused_columns label_names ignore_pad_token_for_loss dataset_kwargs "
            "include_inputs_for_metrics dataset_text_field",
            "not needed: columns that no layout reads are left alone; data.columns gives the others their names",
        ),
        (
            "pad_to_sequence_len batch_flattening multipack_real_batches packing_strategy neat_packing "
            "eval_packing eval_sample_packing dpo_padding_free sample_packing_group_size sample_packing_bin_size "
            "split_across_pack sample_packing_sequentially sample_packing_eff_est total_num_tokens",
            "not needed: rows are always packed, and no token sees another row's",
        ),
        (
            "excess_length_strategy max_prompt_len min_sample_len max_packed_sequence_len eval_sequence_len",
            "data.truncation says what a too long pair loses; none is dropped for its length",
        ),
        (
            "train_on_inputs train_on_input train_on_prompt mask_history roles_to_train train_on_eos train_on_eot "
            "assistant_only_loss completion_only_loss train_on_last_step_only",
            "a prompt is never learned, and of a conversation its last answer is; cut longer ones into several rows",
        ),
        (
            "default_system default_system_message new_system_prompt system_prompt",
            "a system message stands in the row: as a turn, or in a column that data.columns names system",
        ),
        ("chat_template_jinja", "data.template takes a file that holds it"),
        ("preserve_thinking split_thinking tool_format reasoning_effort", "what the chat template does with a row"),
        (
            "mix_strategy interleave_probs fraction weight",
            "all rows of all files are used; NAME:train[:50%] takes a part",
        ),
        ("dataset_exact_deduplication remove_duplicates", "not there: take equal rows out of the file"),
        ("dataset_dir", "data.train and data.eval name files with their folder"),
        ("ignore_bias_buffers gradient_as_bucket_view", "not needed: devices exchange what the mesh says"),
        # --------------------------------------------------------------------------------------------- objectives
        ("desirable_weight kto_desirable_weight kto_chosen_weight", "objective.desirable_weight"),
        ("undesirable_weight kto_undesirable_weight kto_rejected_weight", "objective.undesirable_weight"),
        ("dpo_label_smoothing", "objective.label_smoothing"),
        ("rl_beta kl_coef", "objective.beta"),
        ("dpo_use_weighting", "objective.weighting=wpo weighs pairs"),
        ("dpo_loss_type", "objective.name"),
        ("dpo_loss_weights", "objective as a list of blocks: [{name: sigmoid, weight: 0.8}, {name: sft, weight: 1}]"),
        ("dpo_norm_loss", "objective.name=sigmoid_norm divides each log-ratio by its length"),
        ("pref_bco_weight", "a bco_pair block in a list of objectives, with a weight"),
        ("alpha", "that of AlphaPO is not there; simpo is AlphaPO with alpha 0"),
        (
            "stage reward_model recipe trainer_cls method",
            "objective.name says what is trained: sigmoid is DPO; kto, orpo, simpo, reward and sft are others",
        ),
        ("process_reward_model", "not there: a reward model scores whole answers (objective.name=reward)"),
        ("precompute_ref_batch_size ref_model_quantization_bit", "not needed: the reference is computed as the policy"),
        ("ref_model_adapters ref_adapter_name model_adapter_name", "reference.adapter says which adapter it has"),
        ("ref_model_init_kwargs force_use_ref_model", "reference.path and reference.revision name the reference"),
        (
            "use_dft_loss use_asft_loss asft_alpha use_eaft_loss use_eaft eaft_alpha eaft_k "
            "chunked_cross_entropy_num_chunks",
            "not there: objective.name=sft is the plain likelihood",
        ),
        ("use_logits_to_keep dpo_use_logits_to_keep", "not needed: logits are made for scored tokens only"),
        (
            "generate_during_eval dpo_generate_during_eval predict_with_generate",
            "evaluation.answers has the model answer",
        ),
        (
            "generate_samples num_generation_samples generation_max_new_tokens eval_max_new_tokens max_new_tokens "
            "eval_table_size do_causal_lm_eval do_bench_eval bench_dataset num_completions_to_print "
            "log_completions",
            "evaluation.answers has the model answer prompts of a file while it is trained",
        ),
        ("tools", "tools stand in the row, in a column of that name"),
        (
            "max_completion_tokens num_generations temperature top_p top_k min_p reward_funcs reward_weights "
            "use_vllm vllm_* sglang_* ppo_* generation_* scale_rewards num_iterations epsilon epsilon_high "
            "mask_truncated_completions importance_sampling_level multi_objective_aggregation "
            "generation_batch_size reward_model_type vllm ebft reward_model_adapters reward_model_quantization_bit "
            "rollout_func repetition_penalty",
            "not here: nothing is generated while a step is trained; the command rounds alternates the two",
        ),
        # ---------------------------------------------------------------------------------------------- optimizers
        (
            "optim_args galore_* apollo_* badam_* dion_* qgalore_* lisa_* adam_eps optim_target_modules "
            "torchdistx_path adam_epsilon2 adam_beta3 fused optimizer_in_bwd foreach adamw_fused use_galore "
            "use_apollo use_badam use_adam_mini use_muon",
            "optimizer.name is adamw, lion or adafactor; what each takes is in the section",
        ),
        (
            "lr_scheduler_kwargs cosine_min_lr_ratio cosine_constant_lr_ratio lr_div_factor num_cycles "
            "lr_quadratic_warmup jagged_* relora_* eta_min relora",
            "the rate rises over the warm-up and falls to 0 (optimizer.schedule); it has no floor and no restarts",
        ),
        ("embedding_lr embedding_lr_scale lr_groups loraplus_lr_embedding", "one rate for all but adapter.lr_ratio"),
        ("label_smoothing_factor", "tokens are not smoothed; objective.label_smoothing is that of preferences"),
        ("freeze_trainable_layers freeze_trainable_modules unfrozen_parameters freeze_extra_modules", "model.freeze"),
        ("use_llama_pro", "not there: model.freeze names what is not trained"),
        # ------------------------------------------------------------------------------------------------ adapters
        ("lora_target_linear", "adapter.targets"),
        ("additional_target", "adapter.modules_to_save"),
        ("lora_rank_pattern rank_pattern", "adapter.rank_pattern"),
        ("lora_alpha_pattern alpha_pattern", "adapter.alpha_pattern"),
        ("peft_use_rslora", "adapter.rslora"),
        ("peft_layers_to_transform", "adapter.layers"),
        (
            "peft_config lora_fan_in_fan_out peft_init_lora_weights init_lora_weights loftq_config task_type bias "
            "lora_on_cpu qlora_sharded_model_loading peft_autocast_adapter_dtype inference_mode "
            "quantization_device_map peft_layers_pattern layers_pattern save_adapter_weights_only "
            "peft_ensure_weight_tying upcast_lora",
            "not needed: A begins at random and B at zero, both float32 (adapter section)",
        ),
        (
            "pissa_init pissa_iter pissa_convert oft_rank oft_block_size oft_target module_dropout "
            "create_new_adapter peft_layer_replication peft_trainable_token_indices",
            "not there: an adapter is LoRA, RSLoRA or DoRA, begun at zero or gone on with (adapter.path)",
        ),
        # ------------------------------------------------------------------------------------ devices, runs, logs
        ("context_parallel_size sequence_parallel_degree cp_size", "mesh.context"),
        ("tensor_parallel_dim", "mesh.tensor"),
        ("expert_parallel_size", "mesh.expert"),
        ("dp_replicate_size data_parallel_replicate_dim", "mesh.data"),
        ("dp_shard_size data_parallel_shard_dim", "mesh.fsdp"),
        (
            "fsdp fsdp_* ddp_* use_kt kt_* tensor_parallel_plan memory_efficient_fsdp_wrap low_cpu_ram "
            "pipeline_model_parallel_size tensor_model_parallel_size expert_model_parallel_size sequence_parallel "
            "use_distributed_optimizer overlap_* apply_rope_fusion bias_activation_fusion moe_* "
            "recompute_granularity use_packed_sequences megatron_* hyper_parallel_* use_hyper_parallel "
            "expert_parallel_* parallelism_config device device_map max_memory gpu_memory_limit world_size "
            "local_rank deepcompile heads_k_stride ring_attn_func use_mca use_megatron_bridge num_processes nnodes "
            "nproc_per_node offload_folder average_tokens_across_devices custom_sharded_layers deepspeed_config "
            "ray_run_name use_ray ray_num_workers capabilities",
            "not needed: the mesh section lays out the devices, and means are over all of them",
        ),
        ("use_cpu", "not needed: JAX_PLATFORMS=cpu in the environment makes a run use the CPU"),
        ("env hf_use_auth_token", "set in the environment"),
        (
            "eval_delay eval_on_start prediction_loss_only eval_do_concat_batches eval_use_gather_object "
            "eval_batch_size eval_accumulation_steps include_for_metrics batch_eval_metrics batch_size_val "
            "eval_num_beams compute_accuracy eval_causal_lm_metrics eval_on_each_dataset",
            "not needed: held-out data are measured before the first step, in between, and after the last",
        ),
        (
            "save_only_model save_on_each_node save_safetensors enable_jit_checkpoint save_first_step "
            "dynamic_checkpoint",
            "not needed: a checkpoint has all that a run goes on from, and the model is exported at the end",
        ),
        ("save_every_n_steps", "checkpoint.every says it"),
        (
            "ignore_data_skip restore_callback_states_from_checkpoint auto_resume_from_checkpoints "
            "full_determinism adapter_checkpoint",
            "not needed: a run is the same bits each time, and resumes from its output folder where it stopped",
        ),
        (
            "logging_strategy logging_first_step logging_dir log_on_each_node logging_nan_inf_filter log_level "
            "log_level_replica disable_tqdm include_num_input_tokens_seen include_tokens_per_second include_tkps "
            "debug skip_memory_metrics log_peak_memory_stats profiler profiler_steps profiler_steps_start strict "
            "include_effective_tokens_per_second log_dir use_tensorboard is_preprocess axolotl_config_path",
            "not needed: metrics.jsonl has every log.every-th step with rates, tokens and memory; process 0 writes it",
        ),
        (
            "project swanlab_* mlflow_* comet_* trackio_* otel_* use_otel_metrics wandb_* use_wandb use_mlflow "
            "use_comet use_trackio use_swanlab",
            "log.loggers names services; what they need to know of a project is read from the environment",
        ),
        (
            "hub_strategy hub_always_push hub_revision hub_model_revision",
            "export.push pushes the result, once, to main",
        ),
        ("push_dataset_to_hub", "not there: data are not pushed"),
        (
            "torch_empty_cache_steps gc_steps gc_collect_steps auto_find_batch_size per_gpu_train_batch_size",
            "not needed: memory is planned before the run (`plan`), and a step is never made smaller",
        ),
        (
            "loss_watchdog_threshold loss_watchdog_patience",
            "alarms say when a run looks unhealthy; log.max_nonfinite stops one that is broken",
        ),
        (
            "benchmark random_state full_finetuning fast_inference max_lora_rank ignore_warnings verbose is_debug "
            "overwrite_model_dir",
            "not needed: it says nothing of how a run goes here",
        ),
    )
    for name in names.split()
}
"""The name elsewhere -> our key, or what to do instead. `name_*` stands for all names that begin so."""
BEGINNINGS = [name[:-1] for name in FOREIGN if name.endswith("_*")]


def answer_to(name: str) -> str | None:
    """What a name that people bring is here: one of our keys, or what to do instead.

    >>> answer_to("lora_r"), answer_to("galore_rank")
    ('adapter.rank', 'optimizer.name is adamw, lion or adafactor; what each takes is in the section')
    """
    name = name.lower()
    if name in FOREIGN:
        return FOREIGN[name]
    begun = [first for first in BEGINNINGS if name.startswith(first)]
    return FOREIGN[f"{max(begun, key=len)}*"] if begun else None
