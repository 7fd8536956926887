# shellcheck shell=sh
# What all recipes share: the yearly tasks, one after the other, each from the adapter of the one before.
#
# A recipe sets METHOD and the model's defaults and sources this file. Every setting can come from the environment:
#   MODEL MODEL_TYPE TEMPLATE      base model: folder or hub id, and how ms-swift treats it
#   DATA_DIR TASKS                 <DATA_DIR>/<task>-train.json for each task, in this order
#   OUTPUT_DIR SEED                one folder a stage is made in OUTPUT_DIR
#   DEVICE                         cuda (default) or cpu
#   NPROC_PER_NODE DEEPSPEED       processes, ZeRO stage (zero0..zero3, or none)
#   NNODES NODE_RANK MASTER_ADDR MASTER_PORT   several machines: the same command on each, see assets/distributed.md
#   EPOCHS BATCH_SIZE GRAD_ACCUM LR MAX_LENGTH TORCH_DTYPE TUNER_TYPE LORA_RANK LORA_ALPHA ATTN_IMPL SAVE_STEPS
#   SYSTEM_PROMPT                  {Y} stands for the years so far, e.g. 2022-2024; `none` for the template's default
# Further flags of `swift-cl sft` can follow on the command line: sh train/qwen_train_gem.sh --gem_mode agem
#
# Prompt, shuffling and data are the same for every method, so that methods can be compared.

cd "$(dirname "$0")/.." || exit 2

DEVICE="${DEVICE:-cuda}"
DATA_DIR="${DATA_DIR:-datasets/continual_news_mini}"
TASKS="${TASKS:-2022 2023 2024 2025}"
# shellcheck disable=SC2086 # TASKS is a list of words
FIRST_TASK="$(set -- $TASKS && echo "$1")"
RECIPE="$(basename "$0" .sh)"
OUTPUT_DIR="${OUTPUT_DIR:-output/$RECIPE}"
SEED="${SEED:-42}"
EPOCHS="${EPOCHS:-20}"
BATCH_SIZE="${BATCH_SIZE:-4}"
GRAD_ACCUM="${GRAD_ACCUM:-1}"
LR="${LR:-1e-4}"
MAX_LENGTH="${MAX_LENGTH:-4096}"
TUNER_TYPE="${TUNER_TYPE:-lora}"
LORA_RANK="${LORA_RANK:-64}"
LORA_ALPHA="${LORA_ALPHA:-32}"
SAVE_STEPS="${SAVE_STEPS:-500}"
if [ "$DEVICE" = cpu ]; then
    TORCH_DTYPE="${TORCH_DTYPE:-float32}"
    DEEPSPEED="${DEEPSPEED:-none}"
    NPROC_PER_NODE="${NPROC_PER_NODE:-1}"
    gpus=0
else
    TORCH_DTYPE="${TORCH_DTYPE:-bfloat16}"
    DEEPSPEED="${DEEPSPEED:-$RECIPE_DEEPSPEED}"
    NPROC_PER_NODE="${NPROC_PER_NODE:-2}"
    gpus="$NPROC_PER_NODE"
fi
if [ -z "${SYSTEM_PROMPT:-}" ]; then # not inside ${...:-...}, which the brace of {Y} would end
    SYSTEM_PROMPT="你是一个智能助手，主要负责处理与{Y}年新闻相关的对话。整个对话需围绕政治经济、军事战争、文体科教这三大领域展开，回答要基于{Y}年新闻事件，提供准确、客观的信息，避免主观臆断和不实内容。"
fi

command -v swift-cl >/dev/null 2>&1 || {
    echo "swift-cl: error: the command swift-cl is not installed; run: pip install -e ." >&2
    exit 2
}

# years_until TASK: the years so far, as the published recipes write them.
years_until() {
    if [ "$1" = "$FIRST_TASK" ]; then echo "$1"; else echo "$FIRST_TASK-$1"; fi
}

# train_stage TASK FOLDER PREVIOUS [FLAGS...]: one stage; PREVIOUS is empty for the first.
train_stage() {
    task="$1" folder="$2" previous="$3"
    shift 3
    set -- --model "$MODEL" --model_type "$MODEL_TYPE" --template "$TEMPLATE" \
        --dataset "$DATA_DIR/$task-train.json" --split_dataset_ratio 0 \
        --output_dir "$folder" --add_version false --seed "$SEED" --data_seed "$SEED" \
        --cl_method "$METHOD" --cl_task "$task" --cl_resume true \
        --tuner_type "$TUNER_TYPE" --torch_dtype "$TORCH_DTYPE" --max_length "$MAX_LENGTH" \
        --num_train_epochs "$EPOCHS" --per_device_train_batch_size "$BATCH_SIZE" \
        --gradient_accumulation_steps "$GRAD_ACCUM" --learning_rate "$LR" \
        --train_dataloader_shuffle true --save_steps "$SAVE_STEPS" --save_total_limit 2 \
        --check_model false --report_to none "$@"
    if [ "$TUNER_TYPE" != full ]; then
        set -- --lora_rank "$LORA_RANK" --lora_alpha "$LORA_ALPHA" "$@"
    fi
    if [ "$SYSTEM_PROMPT" != none ]; then
        set -- --system "$(printf '%s' "$SYSTEM_PROMPT" | sed "s/{Y}/$(years_until "$task")/g")" "$@"
    fi
    if [ -n "${ATTN_IMPL:-}" ]; then set -- --attn_impl "$ATTN_IMPL" "$@"; fi
    if [ "$DEEPSPEED" != none ]; then set -- --deepspeed "$DEEPSPEED" "$@"; fi
    if [ "$DEVICE" = cpu ]; then
        set -- --use_cpu true "$@"
        if [ "$NPROC_PER_NODE" != 1 ] || [ "${NNODES:-1}" != 1 ]; then set -- --ddp_backend gloo "$@"; fi
    fi
    if [ -n "$previous" ]; then
        set -- --cl_previous "$previous" "$@"
        if [ "$TUNER_TYPE" != full ]; then
            adapter="$(swift-cl resolve-adapter "$previous")"
            set -- --adapters "$adapter" "$@"
        fi
    fi
    if [ "$NPROC_PER_NODE" = 1 ]; then
        env -u NPROC_PER_NODE swift-cl sft "$@"
    else
        NPROC_PER_NODE="$NPROC_PER_NODE" swift-cl sft "$@"
    fi
}

# check_job: a missing model, data file or GPU is one clear line before anything starts.
check_job() {
    set -- --quiet --model "$MODEL" --gpus "$gpus" --data
    for task in $TASKS; do set -- "$@" "$DATA_DIR/$task-train.json"; done
    swift-cl doctor "$@"
}

# train_chain [FLAGS...]: every task in order; `swift-cl sft` leaves a stage alone that is finished.
train_chain() {
    check_job
    number=0
    previous=""
    for task in $TASKS; do
        number=$((number + 1))
        stage="$OUTPUT_DIR/stage_${number}_$task"
        echo "$RECIPE: stage $number ($task): $stage"
        train_stage "$task" "$stage" "$previous" "$@"
        previous="$stage"
    done
    echo "$RECIPE: done. Evaluate all stages with: swift-cl eval $OUTPUT_DIR --benchmark $DATA_DIR"
}
