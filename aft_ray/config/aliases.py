"""Names that other trainers and engines use for the keys and sections of this config."""

from __future__ import annotations

# Keys, and other names of the same thing. A key is given by the last parts of its path; a leading dot says that it is
# in no section; NAME stands for any entry. Names without a key have no counterpart here, however similar a key looks.
_KEYS = (
    # optimisation
    ("learning_rate", "lr peak_lr max_lr actor_lr"),
    ("weight_decay", "wd decay"),
    ("warmup", "warmup_ratio warmup_steps warmup_fraction lr_warmup lr_warmup_steps"),
    ("max_grad_norm", "clip grad_clip clip_grad clip_grad_norm gradient_clipping max_norm"),
    ("questions_per_step groups_per_step sampling.batch_size", "bs batch batch_size global_batch_size"),
    ("groups_per_step", "train_batch_size mini_batch_size ppo_mini_batch_size"),
    (
        "tokens_per_microbatch",
        "micro_batch_size micro_batch_size_per_gpu ppo_micro_batch_size_per_gpu ppo_max_token_len_per_gpu "
        "per_device_batch_size per_device_train_batch_size max_tokens_per_gpu micro_bs",
    ),
    ("groups_per_step tokens_per_microbatch", "grad_accum gradient_accumulation_steps"),
    ("epochs", "epoch num_epochs n_epochs num_train_epochs"),
    (
        "rounds.count",
        "steps max_steps num_steps total_steps total_training_steps total_epochs iters iterations n_rounds num_rounds",
    ),
    ("zero_stage", "zero stage zero_optimization deepspeed_stage"),
    ("training.deepspeed", "ds_config deepspeed_config deepspeed_args"),
    ("offload_optimizer offload_parameters", "offload cpu_offload"),
    ("offload_parameters", "offload_param offload_params param_offload"),
    ("offload_optimizer", "offload_optim optimizer_offload"),
    (
        "activation_checkpointing",
        "recompute grad_checkpointing gradient_checkpointing enable_gradient_checkpointing activation_checkpoint "
        "selective_activation_checkpointing",
    ),
    ("checkpoint_every_s", "save_steps save_interval save_freq checkpoint_interval checkpoint_every save_every"),
    ("keep_checkpoints", "save_total_limit max_checkpoints"),
    ("schedule", "scheduler lr_scheduler lr_scheduler_type lr_schedule lr_decay_style decay_type warmup_style"),
    (
        "min_learning_rate_ratio",
        "min_lr min_lr_ratio min_lr_rate min_lr_factor learning_rate_floor lr_floor lr_min min_learning_rate eta_min",
    ),
    ("training.optimizer", "optimizer optim optimizer_type optimizer_name optim_type"),
    ("betas", "beta1 beta2 adam_beta1 adam_beta2 adam_betas optim_betas"),
    ("eps", "epsilon adam_epsilon adam_eps"),
    ("compile", "torch_compile use_torch_compile compile_model enable_compile"),
    # the objective and the reward
    ("objective.name", "loss loss_type algorithm algo"),
    ("objective.name feedback.kind weights.transport", "type"),
    ("beta", "margin boundary"),
    ("kl", "kl_coef kl_weight kl_beta kl_loss_coef"),
    ("feedback.kind", "reward rewards reward_type reward_fn reward_model"),
    # sampling
    (
        "k n",
        "k n samples num_samples n_samples num_generations num_return_sequences candidates num_candidates group_size "
        "rollouts best_of n_samples_per_prompt",
    ),
    ("temperature", "temp t"),
    ("top_p", "topp"),
    ("", "top_k"),
    ("max_tokens", "max_new_tokens response_length max_response_length max_completion_length max_gen_len"),
    ("attempts", "retries max_retries tries"),
    ("in_flight concurrency", "concurrency max_concurrency max_concurrent parallel"),
    ("timeout_s", "timeout"),
    ("deadline_s", "deadline timeout"),
    # placement
    ("tensor_parallel_size", "tp tp_size tensor_parallel tensor_model_parallel_size"),
    ("pipeline_parallel_size", "pp pp_size pipeline_parallel pipeline_model_parallel_size"),
    ("samplers workers engine.replicas", "dp dp_size data_parallel_size"),
    ("samplers engine.replicas", "engines num_engines num_samplers"),
    ("workers", "num_workers n_workers world_size nproc_per_node num_processes"),
    ("replicas", "num_replicas n_replicas"),
    (
        "gpus_per_sampler gpus_per_worker engine.gpus",
        "gpu gpus ngpu ngpus n_gpus num_gpus gpus_per_node n_gpus_per_node",
    ),
    ("cpus_per_sampler cpus_per_worker logical_cpus cpus", "cpu cpus ncpu n_cpus num_cpus"),
    ("", "nodes nnodes num_nodes"),
    ("gpu_memory_utilization", "gpu_mem gpu_memory gpu_util gpu_mem_util mem_fraction mem_fraction_static"),
    (
        "engine_args engine.args",
        "engine_kwargs vllm_args vllm_kwargs extra_args extra_engine_args kv_cache_dtype speculative_config "
        "hf_overrides max_num_batched_tokens enforce_eager enable_prefix_caching",
    ),
    ("kv_cache_gib", "kv_cache kv_cache_gb kv_cache_memory"),
    ("colocate", "colocate_all hybrid_engine"),
    ("max_staleness", "staleness off_policy async_level max_off_policy_steps"),
    ("cluster.address", "ray_address head"),
    ("cluster.grows", "autoscale autoscaler autoscaling"),
    ("weights.transport", "backend sync sync_method weight_sync"),
    ("", "host port"),
    # the model and the data
    (
        "model.name .model",
        "model_path model_name model_name_or_path model_id pretrained base_model hf_model checkpoint id path model",
    ),
    ("dtype", "precision torch_dtype data_type bf16 fp16"),
    (
        "max_length",
        "seq_len seq_length max_len max_seq_len max_seq_length sequence_length context context_length max_model_len "
        "block_size",
    ),
    ("data.path task.path tasks.NAME.path", "file files dir data_dir data_path dataset_path filename"),
    ("data.task task.task tasks.NAME.task", "dataset dataset_name name"),
    ("judge.model", "name"),
    ("custom.train", "train_file train_files train_data train_path"),
    ("custom.validation", "val val_file val_files eval_file validation_file"),
    ("custom.test", "test_file test_files test_data"),
    ("custom.question", "prompt_key question_key input"),
    ("custom.gold custom.reference", "answer answer_key response_key"),
    ("train_limit", "limit max_samples num_examples max_train_samples train_samples"),
    ("prompt chat_template", "template prompt_template"),
    ("chat_template_kwargs", "template_kwargs chat_kwargs default_chat_template_kwargs enable_thinking thinking"),
    ("system_prompt", "system system_message default_system_prompt"),
    ("template_date", "date date_string today current_date strftime_now"),
    # the run
    (".run_dir", "output output_dir out_dir save_dir log_dir ckpt_dir rundir default_local_dir"),
    ("seed", "random_seed manual_seed"),
    ("rounds.evaluate_every", "every eval_every eval_steps eval_interval eval_freq test_freq"),
    ("", "wandb mlflow logger loggers report_to project"),
    # LoRA
    ("lora.rank", "r lora_r"),
    ("lora.targets", "target_modules"),
    (
        "lora.quantize",
        "load_in_4bit load_in_8bit quantization quantization_bit quantize_base bnb_4bit_quant_type qlora",
    ),
    # the service
    ("api_key_env keys_file keys_env", "api_key"),
    ("keys_file keys_env", "api_keys"),
    ("url", "base_url"),
)

_SECTIONS = (
    ("training", "train trainer optim optimizer actor deepspeed"),
    ("sampling answering", "rollout sampler samplers generation generate"),
    ("sampling engine", "vllm"),
    ("vft", "sft"),
    ("objective", "loss algorithm algo"),
    ("data task", "dataset datasets"),
    ("evaluation", "eval val validation test"),
    ("feedback", "reward rewards verifier"),
    ("lora", "peft"),
    ("cluster", "ray"),
)


def _by_name(table: tuple[tuple[str, str], ...]) -> dict[str, tuple[str, ...]]:
    result: dict[str, tuple[str, ...]] = {}
    for keys, names in table:
        for name in names.split():
            result[name] = (*result.get(name, ()), *keys.split())
    return result


KEY_ALIASES = _by_name(_KEYS)
SECTION_ALIASES = _by_name(_SECTIONS)
