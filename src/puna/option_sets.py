"""The command line's vocabulary: every verb's options, one name and one meaning for all verbs. Imports no torch."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from puna.options import argument, option

MODEL = "path, Hugging Face id (org/name) or alias (smollm2-135m-instruct) of a checkpoint"
Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]


@dataclass(kw_only=True)
class ModelOptions:
    """How the model is loaded."""

    model: str = argument(MODEL)
    revision: str | None = option(None, "branch, tag or commit of a Hugging Face id")
    device: str = option("auto", "cpu, cuda, cuda:1 ...; auto takes a GPU when there is one")
    dtype: Dtype = option("auto", "data type of the weights in memory; auto is the checkpoint's own")
    weights: Literal["auto", "random"] = option("auto", "random: no weights are read, to time any size")
    adapter: Path | None = option(None, "directory of a LoRA adapter in peft's layout, merged into the weights at load")
    quantization: str | None = option(None, "int8: store the linear layers' weights as int8, packed while they load")
    template: str | None = option(
        None, "chat template: a built-in (chatml, llama2, llama3, alpaca, vicuna) or a Jinja file"
    )
    max_model_len: int | None = option(None, "longest prompt plus answer, in tokens; the config's own when not given")
    kv_tokens: int | None = option(None, "tokens that the KV cache holds; sized from free memory when not given")
    max_batch_tokens: int = option(2048, "tokens computed in one step, prompts and answers together")
    max_num_seqs: int = option(256, "sequences that run at once")


@dataclass(kw_only=True)
class SamplingOptions:
    """How tokens are chosen. What is not given comes from generation_config.json, else greedy."""

    max_tokens: int | None = option(None, "most tokens in an answer; up to the context when not given")
    min_tokens: int | None = option(None, "no end token before this many")
    temperature: float | None = option(None, "0 is greedy; 1 samples the model's own distribution")
    top_p: float | None = option(None, "sample among the likeliest tokens that together reach this probability")
    top_k: int | None = option(None, "sample among this many likeliest tokens; 0 is all")
    min_p: float | None = option(None, "drop tokens less likely than this fraction of the likeliest")
    typical_p: float | None = option(None, "locally typical sampling, 1 is off")
    repetition_penalty: float | None = option(None, "above 1 makes tokens that occurred less likely")
    presence_penalty: float | None = option(None, "subtracted once from tokens of the answer so far")
    frequency_penalty: float | None = option(None, "subtracted per occurrence from tokens of the answer so far")
    logit_bias: dict[int, float] | None = option(None, "added to the logits of token ids, as in '{13: -100}'")
    seed: int | None = option(None, "makes sampling repeatable")
    stop: tuple[str, ...] | None = option(None, "end the answer before this text; repeat for several")
    stop_token_ids: tuple[int, ...] | None = option(None, "end the answer at any of these token ids")
    ignore_eos: bool | None = option(None, "true: go on past the end token, to time fixed lengths")
    n: int | None = option(None, "answers per prompt")
    num_beams: int | None = option(None, "beam search with this many beams; 1 is off")
    length_penalty: float | None = option(None, "beam search: above 0 prefers longer answers")
    early_stopping: bool | Literal["never"] | None = option(None, "beam search: when to stop looking for better")
    logprobs: int | None = option(None, "give the log-probability of each token, and of this many likeliest")
    prompt_logprobs: int | None = option(None, "the same for the tokens of the prompt")


@dataclass(kw_only=True)
class PullOptions:
    """Fetch a model into the local cache and print where it is.

    Examples:
      puna pull smollm2-135m-instruct
      puna pull meta-llama/Llama-3.2-1B-Instruct --revision main
    """

    model: str = argument("an alias (smollm2-135m-instruct) or a Hugging Face id (org/name)")
    revision: str | None = option(None, "branch, tag or commit of a Hugging Face id")


@dataclass(kw_only=True)
class InfoOptions:
    """Say what a checkpoint is: format, shape, data types, tokenizer, template, size in memory.

    Examples:
      puna info smollm2-135m-instruct
      puna info ./my-model --json
    """

    model: str = argument(MODEL)
    revision: str | None = option(None, "branch, tag or commit of a Hugging Face id")
    json: bool = option(False, "print JSON")


@dataclass(kw_only=True)
class ConvertOptions:
    """Turn a checkpoint of any format into another, tensor by tensor, and prove the result against its source.

    Reads Hugging Face directories (safetensors, .bin), Meta consolidated.*.pth, directories of pre-split ranks,
    Megatron checkpoints, GGUF and llama2.c .bin. A conversion that is stopped leaves nothing behind.

    Examples:
      puna convert smollm2-135m-instruct smollm2 --to hf --dtype bfloat16
      puna convert smollm2 smollm2-q8_0.gguf --to gguf --dtype q8_0
      puna convert smollm2 smollm2-ranks --to ranks --ranks 3
      puna convert smollm2 smollm2-tp3 --to megatron --tp 3 --pp 2
    """

    src: str = argument(MODEL)
    dst: Path = argument("what to write: a directory, or for gguf a file")
    to: Literal["hf", "gguf", "meta", "ranks", "megatron"] = option(MISSING, "format to write")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "q8_0"] = option(
        "auto", "data type to write; auto keeps each tensor's own; q8_0 for gguf only"
    )
    ranks: int = option(1, "meta, ranks: how many files or directories to split over")
    tp: int = option(1, "megatron: tensor-parallel ranks")
    pp: int = option(1, "megatron: stages of the pipeline")
    names: Literal["ascendspeed", "legacy", "core"] = option(
        "ascendspeed", "megatron: names of the tensors; legacy is Megatron-LM's former GPT model, core Megatron-core's"
    )
    merge_mlp: bool = option(False, "megatron: gate and up as one matrix; legacy and core always have them so")
    make_vocab_size_divisible_by: int = option(128, "megatron: pad the vocabulary to a multiple of this x --tp")
    vocab_size: int | None = option(None, "tokens of the source's vocabulary; rows beyond are padding and left out")
    revision: str | None = option(None, "branch, tag or commit of a Hugging Face id")
    overwrite: bool = option(False, "replace DST, if an earlier puna convert wrote it")
    max_shard_gb: float = option(5.0, "hf: largest weight file, in GB")
    proof: bool = option(True, "leave out the comparison of the result with its source")


@dataclass(kw_only=True)
class LoraMergeOptions:
    """Merge a LoRA adapter into its model, and prove that the result computes what model and adapter do.

    Sums are in float32 and rounded once, to the type that is written; how far that moves the logits is said. An adapter
    needs no merging to be used: puna chat, generate and bench take --adapter.

    Examples:
      puna lora merge smollm2-135m-instruct ./adapter ./merged
      puna lora merge ./llama3-8b ./adapter merged.gguf --to gguf --dtype q8_0
    """

    model: str = argument(MODEL)
    adapter: Path = argument("directory of an adapter in peft's layout: adapter_config.json, adapter_model.safetensors")
    dst: Path = argument("what to write: a directory, or for gguf a file")
    to: Literal["hf", "gguf", "meta", "ranks"] = option("hf", "format to write")
    dtype: Literal["auto", "float32", "bfloat16", "float16", "q8_0"] = option(
        "auto", "data type to write; auto is the one that the model is stored in; q8_0 for gguf only"
    )
    revision: str | None = option(None, "branch, tag or commit of a Hugging Face id")
    overwrite: bool = option(False, "replace DST, if puna wrote it")
    proof: bool = option(True, "leave out the comparison of the result with model and adapter")


@dataclass(kw_only=True)
class VerifyOptions:
    """Compare two checkpoints in any two formats: config, tokenizer, every tensor, logits of probe prompts.

    Names the first layer that differs. Exit code 0 when they are the same model, 3 when they differ.

    Examples:
      puna verify smollm2-135m-instruct smollm2
      puna verify smollm2 smollm2-q8_0.gguf --tolerance 0.01
    """

    a: str = argument(MODEL)
    b: str = argument("the other checkpoint")
    tolerance: float | None = option(
        None, "relative difference of a tensor that counts as the same; 0 when not given, 0.02 for quantised ones"
    )
    logits: bool = option(True, "compare what is stored alone, without running both on probe texts")
    json: bool = option(False, "print JSON")


@dataclass(kw_only=True)
class ChatOptions(ModelOptions, SamplingOptions):
    """Talk with a model. The answer streams to stdout, everything else goes to stderr.

    In the chat: q, quit or exit leave; clear or new start over; /system TEXT sets the system message; /help lists
    these. Lines may be piped in. A chat that outgrows the context drops its oldest turns and says so.

    Examples:
      puna chat smollm2-135m-instruct
      puna chat ./my-model --system "Answer in one line." --temperature 0.7 --top-p 0.9
      echo "What is the capital of France?" | puna chat smollm2-135m-instruct
    """

    system: str | None = option(None, "system message; the template's own when not given")
    verbose: bool = option(False, "say after each answer how many tokens it took and how fast they came")


@dataclass(kw_only=True)
class GenerateOptions(ModelOptions, SamplingOptions):
    """Complete one prompt or thousands: arguments, a text file with one prompt a line, JSONL, or stdin.

    A JSONL row is {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}, with an optional "id", an
    optional "metadata" that comes out as it went in, and the row's own values for the options of how tokens are chosen.
    JSONL goes in and JSONL comes out, in the same order: {"index", "id", "choices", "usage"}, or {"index", "id",
    "error"} for a bad row, and the rest goes on; that is no failure of the run. With --out, a second run skips the rows
    that are already there.

    Examples:
      puna generate smollm2-135m-instruct "The capital of France is" --max-tokens 16
      puna generate smollm2-135m-instruct --chat "Name three llamas." --n 2 --temperature 0.8 --seed 1
      puna generate smollm2-135m-instruct --file prompts.txt --max-tokens 64
      puna generate smollm2-135m-instruct --file prompts.jsonl --out answers.jsonl
      puna generate smollm2-135m-instruct --file - --jsonl < prompts.jsonl > answers.jsonl
    """

    prompt: tuple[str, ...] = argument("prompts; without any and without --file, all of stdin is one", default=())
    file: str | None = option(None, "prompts: a .jsonl file, a text file with one a line, or - for stdin")
    jsonl: bool = option(False, "--file is JSONL whatever its name, and JSONL is printed")
    out: Path | None = option(None, "write JSONL here; rows that it already holds are not generated again")
    chat: bool = option(False, "a prompt is a user's message: apply the chat template")
    system: str | None = option(None, "system message of --chat")


@dataclass(kw_only=True)
class BenchOptions(ModelOptions):
    """What is timed."""

    model: str = argument(MODEL + "; with --weights random also a preset (llama2-7b, llama3.1-8b ...)")
    input_len: tuple[int, ...] = option((128, 512), "prompt lengths in tokens")
    output_len: tuple[int, ...] = option((64,), "answer lengths in tokens")
    batch_size: tuple[int, ...] = option((1, 4, 16), "requests at once")
    seed: int = option(0, "of the random prompts and weights")
    json: Path | None = option(None, "also write the table as JSON")
    plot: Path | None = option(None, "also draw the table as a PNG")


@dataclass(kw_only=True)
class LatencyOptions(BenchOptions):
    """Time prefill and decode apart over a grid of prompt lengths, answer lengths and batch sizes; medians.

    Decode is also given as a share of the memory bandwidth that a plain read reaches on the same device.

    Examples:
      puna bench latency smollm2-135m-instruct --input-len 128,512 --output-len 64 --batch-size 1,4
      puna bench latency tiny --weights random --input-len 64 --json times.json --plot times.png
    """

    warmup: int = option(1, "untimed rounds before the timed ones")
    repeats: int = option(3, "timed rounds")


@dataclass(kw_only=True)
class ThroughputOptions(BenchOptions):
    """Time a queue of requests, --batch-size of them at once: requests/s, tokens/s, percentiles of the latency.

    Lengths come from the grid, or from the conversations of a ShareGPT-style file:
    [{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}].

    Examples:
      puna bench throughput smollm2-135m-instruct --input-len 128 --output-len 64 --num-prompts 32
      puna bench throughput smollm2-135m-instruct --dataset conversations.json --batch-size 16
    """

    num_prompts: int = option(64, "requests per line of the table")
    dataset: Path | None = option(None, "a ShareGPT-style JSON file; its lengths replace the grid")


@dataclass(kw_only=True)
class LaunchOptions:
    """Run a verb on several devices of this machine or of many, by torchrun; or print what Slurm or Kubernetes need.

    Examples:
      puna launch --nproc 2 train run.yaml --mesh.tp 2
      puna launch --nproc 8 --nnodes 4 --rendezvous node0:29500 train run.yaml
      puna launch --nproc 8 --nnodes 4 --slurm train run.yaml > job.sh
      puna launch --nproc 8 --nnodes 4 --k8s --image registry/puna:latest train run.yaml > job.yaml
    """

    command: tuple[str, ...] = argument("the verb and its arguments, all that follows", default=(), rest=True)
    nproc: int = option(1, "processes on each node, one a device")
    nnodes: int = option(1, "machines")
    rendezvous: str | None = option(None, "HOST:PORT of the first node, where the nodes meet")
    slurm: bool = option(False, "print an sbatch script")
    k8s: bool = option(False, "print a Kubernetes Job with its Service")
    name: str = option("puna", "manifests: the job's name")
    gpus: bool = option(True, "manifests: ask for a GPU per process")
    cpus: int = option(8, "manifests: CPU cores per process")
    time: str = option("24:00:00", "Slurm: longest time of the job")
    image: str | None = option(None, "Kubernetes: container image with puna")
    volume: str = option("workspace", "Kubernetes: claim of the volume that all pods share, mounted as /workspace")


@dataclass(kw_only=True)
class DoctorLossOptions:
    """Compare the losses of two training runs: relative 2 %, absolute 0.005, as means over the steps that both have.

    Exit code 0 when they agree, 3 when they differ.

    Examples:
      puna doctor loss runs/one-gpu runs/eight-gpus
      puna doctor loss runs/a runs/b --plot losses.png
    """

    a: Path = argument("a run's folder or metrics.jsonl, the reference")
    b: Path = argument("the other run")
    relative: float = option(0.02, "limit of the mean relative difference")
    absolute: float = option(0.005, "limit of the mean absolute difference")
    plot: Path | None = option(None, "also draw both as a PNG")
    json: bool = option(False, "print JSON")


@dataclass(kw_only=True)
class DemoOptions:
    """The main job on real weights: import a GGUF, prove it, chat, generate a batch, time it. About a minute.

    Examples:
      puna demo
      puna demo --model smollm2-135m-instruct --out demo
    """

    model: str = option("smollm2-135m-instruct", "the checkpoint that the demo imports")
    out: Path = option(Path("demo"), "folder for the imported checkpoint, the answers and the plot")


@dataclass(kw_only=True)
class PrepareOptions:
    """Turn raw files into token data for training: Megatron's .bin/.idx, and a JSON card that says what is in it.

    Reads .jsonl, .json, .csv, .txt, .parquet and .arrow, plain or as .gz or .zst: files, folders, globs, and datasets
    of the Hugging Face Hub. Handlers: text, wikitext, wikitext-clean, alpaca, sharegpt, vicuna, openai, moss,
    moss-turns, belle, squad, squad-first, leetcode, preference. Killed, the same command goes on where it was.

    Examples:
      puna data prepare corpus/*.txt --out data/corpus --tokenizer smollm2-135m-instruct
      puna data prepare alpaca.json --out data/alpaca --tokenizer ./llama2-7b --template alpaca
      puna data prepare chats.jsonl.gz --out data/chats --tokenizer smollm2-135m-instruct --loss last
      puna data prepare HuggingFaceFW/fineweb --subset sample-10BT --out data/web --tokenizer ./llama3-8b
    """

    src: tuple[str, ...] = argument("files, folders, globs or Hub datasets (org/name)")
    out: Path = option(MISSING, "prefix of what is written: OUT_train_text_document.bin, OUT.json and so on")
    tokenizer: str = option(MISSING, MODEL + ", or a tokenizer file; its template is used too")
    handler: str = option("auto", "what the rows are; auto looks at their fields and says what it found")
    template: str | None = option(
        None, "chat template: a built-in (chatml, llama2, llama3, alpaca, vicuna) or a Jinja file"
    )
    template_values: dict[str, str] | None = option(
        None, "variables for the template, as in '{date_string: 26 Jul 2024}'"
    )
    loss: Literal["all", "last"] = option("all", "which answers of a conversation are trained")
    text_field: str = option("text", "handler text: the field that holds the document")
    documents: Literal["line", "paragraph", "file"] = option("line", "what a document is in a text file")
    append_eos: bool = option(True, "leave out the EOS after every document")
    validation: float = option(0.01, "share of the samples, by their hash, kept apart for validation; 0 is no split")
    workers: int | None = option(None, "processes; all cores when not given")
    engine: Literal["local", "ray"] = option(
        "local", "ray: as a Ray Data job on the cluster that this machine belongs to"
    )
    subset: str | None = option(None, "Hub datasets: the subset (configuration)")
    split: str = option("train", "Hub datasets: the split")
    revision: str | None = option(None, "Hub datasets: branch, tag or commit")
    overwrite: bool = option(False, "replace the data of that name")


@dataclass(kw_only=True)
class ShowOptions:
    """Print samples of prepared data: what is trained in colour, prompts dim, special tokens as they stand.

    Examples:
      puna data show data/alpaca_train --tokenizer smollm2-135m-instruct
      puna data show data/alpaca_train --samples 20 --html alpaca.html
    """

    prefix: str = argument("prefix of the data, as data/alpaca_train")
    tokenizer: str | None = option(None, MODEL + "; the one that the data were made with when not given")
    samples: int = option(5, "how many samples")
    start: int = option(0, "the first of them")
    max_tokens: int = option(2000, "longest part of a sample that is shown")
    html: Path | None = option(None, "write a page instead of printing")


@dataclass(kw_only=True)
class StatsOptions:
    """Totals of prepared data, and how long its samples are.

    Examples:
      puna data stats data/alpaca_train data/alpaca_validation
      puna data stats data/corpus_train --plot lengths.png --seq-len 2048
    """

    prefix: tuple[str, ...] = argument("prefixes of the data")
    plot: Path | None = option(None, "draw the lengths as a histogram (PNG)")
    seq_len: int | None = option(None, "also say how well rows of this length are packed")


def sampling(options: SamplingOptions) -> dict[str, Any]:
    """The sampling options that were given; the rest is the checkpoint's to decide."""
    given = {entry.name: getattr(options, entry.name) for entry in fields(SamplingOptions)}
    return {name: value for name, value in given.items() if value is not None}


def loading(options: ModelOptions) -> dict[str, Any]:
    """`LLM`'s keyword arguments, with progress shown."""
    return {entry.name: getattr(options, entry.name) for entry in fields(ModelOptions)} | {"quiet": False}
