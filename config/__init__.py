"""
Every knob of every stage, typed, with its default and what it does; and the loader that fills them in.

    defaults  <  config files, in order  <  --key=value
    python train.py config/shakespeare.py --max_iters=100 --no_compile

A config file is plain Python assignments (see the files beside this one). Any script takes any config file.
`python train.py --help` prints every knob below. Nothing outside this file knows a default.
"""
import ast, contextlib, dataclasses, difflib, math, os, re, sys, types, typing
from dataclasses import dataclass
from typing import Literal


@dataclass
class GPTConfig:
    """The model's shape, nothing else; travels in every checkpoint. The defaults are a modern 124M-class GPT."""
    block_size: int = 1024          # longest context, in tokens
    vocab_size: int = 50304         # rows of the embedding; for tokenizer="bpe" also the size of the vocabulary to train
    n_layer: int = 12               # transformer blocks
    n_head: int = 12                # query heads
    n_kv_head: int = 0              # key/value heads: 0 = n_head (MHA), 1 = MQA, between = GQA; divides n_head
    n_embd: int = 768               # width of the residual stream
    head_size: int = 0              # width of a head: 0 = n_embd/n_head
    n_inner: int = 0                # hidden width of the MLP: 0 = 4*n_embd, or 8/3*n_embd for swiglu (same size)
    pos: Literal["rope", "learned", "sinusoidal"] = "rope"          # how a token knows its position
    rope_theta: float = 10000.0     # RoPE's base wavelength
    rope_scaling: Literal["none", "linear", "ntk", "yarn", "llama3"] = "none"   # stretch RoPE to a longer context, trained or when sampling
    rope_factor: float = 1.0        # by how much: block_size is rope_factor times the length the model was (first) trained at
    rope_trained: int = 0           # that length, in tokens, where it is another: 0 = block_size/rope_factor
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"               # RMSNorm has a learned gain only with norm_gain
    norm_gain: bool = False         # RMSNorm and QK-norm multiply by a learned gain, as Llama and Qwen3
    norm_eps: float = 1e-5          # added to the variance in every norm
    mlp: Literal["relu2", "swiglu", "gelu"] = "relu2"               # activation of the MLP
    bias: bool = False              # biases in linear layers and LayerNorm, as GPT-2
    qk_norm: bool = True            # normalise queries and keys per head before the dot product
    window_pattern: str = ""        # "" = every layer sees all; "SSSL", say, repeats over the layers: S sees the last `window` tokens, L all; the last layer is L
    window: int = 0                 # how many that is, a token itself included
    logit_softcap: float = 0.0      # squash logits into (-cap, cap) by cap*tanh(x/cap); 0 = off
    tie_weights: bool = False       # share the embedding with the output head
    zero_init: bool = True          # output projections and untied head start at zero; False: GPT-2's scaled normal
    dropout: float = 0.0            # probability of zeroing in attention, MLP and embedding

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        require(self.head_size or self.n_embd % self.n_head == 0, f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        require(self.n_kv_head >= 0 and self.n_head % (self.n_kv_head or self.n_head) == 0,
                f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}; 0 means n_kv_head = n_head")
        require(self.pos != "rope" or self.head_dim % 2 == 0,
                f"pos='rope' rotates pairs: head_size (n_embd/n_head) = {self.head_dim} must be even")
        require(self.pos != "sinusoidal" or self.n_embd % 2 == 0, f"pos='sinusoidal' needs an even n_embd, not {self.n_embd}")
        require(not (self.tie_weights and self.zero_init),
                "zero_init would zero the embedding that tie_weights shares: set one of them to False")
        require(0 <= self.dropout < 1, f"dropout={self.dropout} must be in [0, 1)")
        require(self.rope_factor >= 1 and (self.rope_scaling == "none") == (self.rope_factor == 1) and (self.pos == "rope" or self.rope_factor == 1),
                f"rope_scaling={self.rope_scaling!r} and rope_factor={self.rope_factor} belong together: set both, the factor above 1, with pos='rope'")
        require(min(self.n_inner, self.head_size, self.rope_trained, self.logit_softcap) >= 0 and min(self.rope_theta, self.norm_eps) > 0,
                "n_inner, head_size, rope_trained and logit_softcap must be at least 0 (0 = default, off), rope_theta and norm_eps above 0")
        require(set(self.window_pattern) <= {"S", "L"} and self.window >= 0 and ("S" in self.window_pattern) == (self.window > 0),
                f"window_pattern={self.window_pattern!r} and window={self.window} belong together: a pattern of S and L such as 'SSSL', and a window above 0")
        require(not self.norm_gain or self.norm == "rmsnorm", "norm_gain is RMSNorm's: layernorm always has its own")

    @property
    def head_dim(self): return self.head_size or self.n_embd // self.n_head

    @property
    def kv_heads(self): return self.n_kv_head or self.n_head

    @property
    def trained_length(self): return self.rope_trained or self.block_size / self.rope_factor

    @property
    def windows(self):
        """How many tokens each layer sees, 0 = all: window_pattern="SL", window=64, n_layer=5 -> [64, 0, 64, 0, 0]"""
        pattern = self.window_pattern or "L"
        return [self.window if pattern[layer % len(pattern)] == "S" else 0 for layer in range(self.n_layer - 1)] + [0]

    @property
    def inner(self):
        if self.n_inner: return self.n_inner
        return 64 * round(self.n_embd * 8 / 3 / 64) or 64 if self.mlp == "swiglu" else 4 * self.n_embd


@dataclass
class Config(GPTConfig):
    """GPTConfig plus the knobs of data, tokenizer, training and sampling. `cfg.model()` is the GPTConfig alone."""
    # data (prepare.py)
    dataset: str = "stdlib"         # stdlib, shakespeare, tinystories, fineweb, or any name of yours together with --input
    input: str = ""                 # your own files or folders (.txt .md .py .jsonl), comma separated; for bench.py eval texts to measure
    tokenizer: str = "bpe"          # bpe = train our own on the training split; gpt2; or the path of a tokenizer.json
    split_pattern: Literal["gpt2", "gpt4"] = "gpt2"                 # how bpe cuts text into words before merging
    val_fraction: float = 0.1       # share of the documents (of a single text: its last part) held out for validation
    num_shards: int = 103           # fineweb: training shards of 100M tokens to fetch; 103 is all of FineWeb-10B
    workers: int = 0                # processes that encode; 0 = one per core
    # run (train.py)
    out_dir: str = ""               # checkpoints and log; "" = out/<dataset> to train, the newest run in out/ to sample
    init_from: str = "scratch"      # scratch; resume = go on from out_dir/ckpt.pt; gpt2, gpt2-medium, -large, -xl or a Hugging Face folder
    max_iters: int = 1000           # optimizer steps
    batch_size: int = 16            # sequences per forward pass on one device
    tokens_per_step: int = 0        # tokens per optimizer step over all devices; 0 = batch_size*block_size on one device
    eval_interval: int = 250        # steps between evaluations and checkpoints
    eval_tokens: int = 0            # validation tokens per evaluation, the same every time; 0 = the whole split
    log_interval: int = 10          # steps between log lines
    doc_mask: bool = False          # in training and validation a token sees nothing before the start of its own document
    sample_interval: int = 0        # steps between samples printed during training; 0 = only at the end
    keep_checkpoints: int = 0       # besides ckpt.pt and best.pt keep ckpt_<step>.pt of so many of the last evaluations
    wandb_log: bool = False         # log to Weights & Biases, too
    wandb_project: str = "gpt"      # its project; the run is named after out_dir
    profile: int = 0                # trace so many steps, after three to warm up, into out_dir/trace.json (chrome://tracing)
    seed: int = 1337                # of initialisation, batches and sampling
    # fine-tuning (train.py)
    objective: Literal["tokens", "dpo"] = "tokens"  # tokens: predict the next; dpo: prefer the chosen answers of prepared pairs
    dpo_beta: float = 0.1           # dpo: how much a step away from the starting model costs; smaller = free to go further
    lora_rank: int = 0              # freeze the model and learn low-rank additions to its attention matrices; 0 = train every weight
    # optimizer (model.py, train.py)
    optimizer: Literal["muon", "adamw"] = "muon"    # muon: Muon for hidden matrices, AdamW for the rest
    learning_rate: float = 6e-4     # AdamW's, for every parameter that has no rate of its own below
    matrix_lr: float = 0.01         # Muon: hidden matrices
    embedding_lr: float = 0.05      # with Muon: AdamW's rate for the embedding
    unembedding_lr: float = 0.004   # with Muon: AdamW's rate for the head
    weight_decay: float = 0.0       # decoupled, on matrices only
    beta1: float = 0.8              # AdamW's momentum
    beta2: float = 0.95             # AdamW's second moment
    grad_clip: float = 1.0          # largest gradient norm; 0 = no clipping
    max_bad_steps: int = 10         # stop after so many steps in a row with a non-finite gradient; each is skipped
    warmup_iters: int = 0           # steps of linear warm-up
    lr_schedule: Literal["linear", "cosine"] = "linear"             # shape of the decay
    decay_frac: float = 1.0         # last part of max_iters that decays; 1 = decay starts right after the warm-up
    min_lr_frac: float = 0.05       # the last step's learning rate, as a part of the peak
    # machine
    device: str = "auto"            # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"   # of the forward pass; weights stay float32 in training
    grad_checkpoint: bool = False   # keep only each block's input and compute its activations again in the backward pass: less memory
    shard_optimizer: bool = False   # torchrun: each rank keeps a part of the optimizer state (ZeRO stage 1, arXiv:1910.02054)
    compile: bool | None = None     # torch.compile; unset = in training on CUDA, where it pays within a minute
    # evaluation (bench.py eval)
    task: str = ""                  # questions: hellaswag, arc_easy, arc_challenge, mmlu or .jsonl files of theirs, comma separated
    stride: int = 0                 # tokens scored in each window of a text; 0 = block_size/2: each sees half a context at least
    # sampling (sample.py)
    start: str = ""                 # the prompt, or FILE:path; "" = begin with the end-of-text token
    prompts: str = ""               # a file of prompts, one per line: continue them together and print JSON lines
    num_samples: int = 1            # continuations to draw of each prompt
    max_new_tokens: int = 256       # length of each, in tokens
    temperature: float = 0.8        # 0 = argmax; below 1 = safer, above 1 = wilder
    top_k: int = 200                # keep the k likeliest tokens; 0 = all
    top_p: float = 1.0              # keep the likeliest tokens that add up to p; 1 = all
    min_p: float = 0.0              # keep tokens at least this share as likely as the likeliest; 0 = all
    repetition_penalty: float = 1.0 # above 1 makes tokens that the text already has less likely; 1 = off
    stop: str = ""                  # end a sample at this text or special token; several: separated by |, \n is a line end
    num_beams: int = 1              # above 1: beam search of this width, with temperature 0
    best_of: int = 1                # above num_samples: draw so many and keep the num_samples likeliest
    length_penalty: float = 1.0     # beams and best_of rank by log-probability / tokens ** length_penalty
    logprobs: bool = False          # print the log-probability of every token, in nats, under the model itself
    past_context: Literal["window", "error"] = "window"     # a full context: forget its oldest tokens, or refuse before starting
    sinks: int = 4                  # window: the first tokens are never forgotten, so many of them (attention sinks)
    quantize: Literal["none", "int8"] = "none"              # int8: matrices as 8-bit integers with a scale per row
    speculate: int = 0              # draft so many tokens from earlier text, check them in one pass; 0 = off
    prefill_chunk: int = 512        # prompt tokens per forward pass
    interactive: bool = False       # a conversation: each line you type continues the text
    export: str = ""                # instead of sampling, write the model as this folder, which transformers loads
    visualize: str = ""             # write this HTML page: probabilities, alternatives and attention of the first sample

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_iters", "batch_size", "max_bad_steps", "eval_interval", "log_interval", "num_samples", "max_new_tokens", "num_shards",
                     "num_beams", "best_of", "prefill_chunk"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        for name in ("tokens_per_step", "eval_tokens", "workers", "warmup_iters", "temperature", "top_k", "weight_decay", "grad_clip",
                     "length_penalty", "sinks", "speculate", "sample_interval", "keep_checkpoints", "profile", "lora_rank", "dpo_beta", "stride"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        for name in ("min_lr_frac", "min_p", "decay_frac", "beta1", "beta2"):
            require(0 <= getattr(self, name) <= 1, f"{name}={getattr(self, name)} must be between 0 and 1")
        require(0 < self.val_fraction < 1, f"val_fraction={self.val_fraction} must lie between 0 and 1")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must be in (0, 1]; 1 keeps every token")
        require(self.repetition_penalty > 0, f"repetition_penalty={self.repetition_penalty} must be above 0; 1 = off")
        require(not self.lora_rank or self.init_from != "scratch", f"lora_rank={self.lora_rank} adapts a trained model: say which by --init_from=gpt2 or a folder")
        require(self.objective != "dpo" or self.batch_size % 2 == 0, f"objective='dpo' trains on pairs: batch_size={self.batch_size} must be even")
        require(self.num_beams == 1 or self.temperature == 0 and self.num_samples <= self.num_beams and self.best_of == 1 and not self.speculate,
                f"num_beams={self.num_beams} is a search, not a draw: it needs --temperature=0, best_of=1, speculate=0 and num_samples <= num_beams")

    def model(self):
        return GPTConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(GPTConfig)})


def require(ok, message):
    if not ok: raise ValueError(message)


KINDS = typing.get_type_hints(Config)


def coerce(key, value, text):
    """`value` for knob `key` as its type: coerce("max_iters", "1e3", text=True) -> 1000. `text`: it is a word of the command line."""
    kind, choices = KINDS[key], typing.get_args(KINDS[key])
    if text and kind is not str and value not in choices:
        with contextlib.suppress(ValueError, SyntaxError): value = ast.literal_eval(value.title() if value.isalpha() else value)
    if kind in (int, float):
        if type(value) in (int, float) and math.isfinite(value) and kind(value) == value: return kind(value)
    elif value in choices if typing.get_origin(kind) is Literal else isinstance(value, kind): return value
    wanted = " or ".join(map(repr, choices)) if typing.get_origin(kind) is Literal else "True or False" if bool in (kind, *choices) else kind.__name__
    raise ValueError(f"{key} wants {wanted}, not {value!r}")


def load(argv):
    """Config from command-line words: files of assignments and --key=value, --key, --no_key. ValueError for what is wrong."""
    values, files, flags = {}, [a for a in argv if not a.startswith("--")], [a[2:] for a in argv if a.startswith("--")]
    if "help" in flags or "-h" in files:
        print(usage()); raise SystemExit(0)
    def put(key, value, where, text):
        if key not in KINDS:
            near = difflib.get_close_matches(key, KINDS, n=1)
            raise ValueError(f"{where}: unknown knob {key!r}" + (f", did you mean {near[0]!r}?" if near else "") + " (--help lists all)")
        try: values[key] = coerce(key, value, text)
        except ValueError as e: raise ValueError(f"{where}: {e}") from None
    for path in files:
        if not os.path.isfile(path):
            raise ValueError(f"no config file {path!r} (knobs are written --key=value; config files end in .py)")
        scope = {}
        try:
            with open(path, encoding="utf-8") as f: exec(compile(f.read(), path, "exec"), scope)
        except Exception as e:
            raise ValueError(f"{path}: not a config file of plain assignments: {type(e).__name__}: {e}") from None
        for key, value in scope.items():
            if not key.startswith("_") and not isinstance(value, types.ModuleType): put(key, value, path, False)
    for flag in flags:
        key, equals, value = flag.partition("=")
        if not equals: key, value = (key[3:], "False") if key.startswith("no_") and key[3:] in KINDS else (key, "True")
        put(key, value, "--" + flag.partition("=")[0], True)
    return Config(**values)


def usage():
    """Every knob with its default and comment, read from the two classes above."""
    with open(__file__, encoding="utf-8") as f: source = f.read()
    knobs = re.findall(r"^    (?:(# .*)|(\w+): (.+?) = (.+?) +# (.+))$", source.split("@dataclass\nclass GPTConfig")[1].split("def require")[0], re.M)
    lines = [head or f"  --{key:<20}{kind.replace('Literal', ''):<12} {comment} (default {default})" for head, key, kind, default, comment in knobs]
    return f"{(__doc__ or '').strip()}\n\n# model\n" + "\n".join(lines)


def show(cfg):
    """The resolved config on a few lines, for the start of a run."""
    out, line = [], ""
    for f in dataclasses.fields(cfg):
        item = f"{f.name}={getattr(cfg, f.name)!r}"
        if len(line) + len(item) > 118: out, line = out + [line], ""
        line += "  " + item
    return "\n".join(out + [line])


def run(main, parse=load):
    """What every script's `if __name__ == "__main__"` calls: main(load(argv)), user errors as one line, exit code 1."""
    try: main(parse(sys.argv[1:]))
    except (ValueError, OSError) as e: sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
