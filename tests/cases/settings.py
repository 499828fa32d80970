"""Settings that are wrong, on the command line and in files."""

from tests.cases import Case, flags, toml

DILOCO = ("--strategy.kind", "diloco", "--strategy.sync-every", "50")
SPARSE = ("--strategy.kind", "sparseloco")
DISTRO = ("--strategy.kind", "distro")

FILES = [
    Case("no file", lambda place: ["nowhere.toml"], 2, "config file nowhere.toml does not exist: give the path of a"),
    Case("a directory as file", lambda place: [str(place.inputs)], 2, "config file .*inputs is a directory"),
    Case("file not first", lambda place: ["--train.steps", "3", "c.toml"], 2, "config file c.toml must come first"),
    Case("file not UTF-8", toml(b"[train]\nsteps = 3 # \xff\n"), 2, "c.toml is not valid TOML: 'utf-8' codec .* 0xff"),
    Case("file with NUL", toml(b"[train]\0\n"), 2, "c.toml is not valid TOML: .* line 1, column"),
    Case("torn file", toml("[train\nsteps = 3\n"), 2, "c.toml is not valid TOML: .* line 1, column"),
    Case("YAML with a tag", toml("a: !!python/object/apply:os.system [touch x]\n"), 2, "c.toml is not valid TOML"),
    Case("JSON", toml('{"train": {"steps": 3}}'), 2, "c.toml is not valid TOML"),
    Case("key twice", toml("[train]\nsteps = 1\nsteps = 2\n"), 2, "c.toml is not valid TOML: .*line 3"),
    Case("nesting bomb", toml("a = " + "[" * 5000), 2, "nested too deeply|is not valid TOML"),
    Case("unknown key", toml("[train]\nstep = 3\n"), 2, "c.toml: unknown key train.step: did you mean train.steps?"),
    Case("unknown section", toml("[trane]\nsteps = 3\n"), 2, "c.toml: unknown key trane"),
    Case("text for a number", toml("[train]\nsteps = 'many'\n"), 2, "train.steps: .* valid integer, found 'many'"),
    Case("quoted number", toml("[optimizer]\nlr = '3e-4'\n"), 2, "optimizer.lr: .* valid number, found '3e-4'"),
    Case("unknown strategy", toml("[strategy]\nkind = 'adam'\n"), 2, "c.toml: strategy: .*'adamw', 'distro'"),
    Case(
        "unknown key of a strategy",
        toml("[strategy]\nkind = 'distro'\ncompression_topq = 3\n"),
        2,
        "unknown key strategy.compression_topq: did you mean strategy.compression_topk",
    ),
    Case("batch no multiple", toml("[train]\ntotal_batch = 10\nmicro_batch = 4\n"), 2, "set train.total_batch to 8 or"),
    Case("micro over total", toml("[train]\ntotal_batch = 4\nmicro_batch = 8\n"), 2, "micro_batch is 8, more than tra"),
    Case("ramp that stays", toml("[train]\nbatch_ramp = [[3, 8], [3, 9]]\n"), 2, "batch_ramp has .3, 9. after step 3"),
    Case("weight of 0", toml("[launch]\nweights = [1, 0]\n"), 2, "launch.weights are .1.0, 0.0.: expected numbers ab"),
    Case("skip nothing", toml("[data]\nskip = [{sequences = [0, 3]}]\n"), 2, "an entry of data.skip names a shard"),
    Case("skip no step", toml("[data]\nskip = [{steps = [3, 3]}]\n"), 2, "data.skip has steps .3, 3.: expected .first"),
    Case(
        "blocks of Psyche's", toml("[data]\norder = 'psyche'\nblock = 8\n"), 2, "only data.order shuffle moves blocks"
    ),
    Case("no place", toml("[data]\npath = []\n"), 2, "data.path: .* at least 1 item"),
    Case("place of a number", toml("[data]\npath = [3]\n"), 2, "data.path"),
    Case("NUL in a path", toml('[data]\npath = "a\\u0000b"\n'), 2, "c.toml has a NUL character in a value"),
    Case("NUL in run.dir", toml('[run]\ndir = "a\\u0000b"\n'), 2, "c.toml has a NUL character in a value"),
    Case(
        "rounds of words", toml("[strategy]\nkind = 'diloco'\nsync_every = 'often'\n"), 2, "sync_every is 'often': ex"
    ),
]

ARGUMENTS = [
    Case("unknown option", flags("--train.stepz", "3"), 2, "unknown option --train.stepz: did you mean --train.steps?"),
    Case("option without section", flags("--lrr", "3"), 2, "unknown option --lrr: did you mean --optimizer.lr?"),
    Case("option of another job", flags("--prompt", "x"), 2, "unknown option --prompt"),
    Case("no value", lambda place: ["--train.steps"], 2, "command line: .*steps"),
    Case("a word too many", flags("more"), 2, "unknown|must come first|unrecognized"),
    Case("value of a switch", flags(*DISTRO, "--strategy.overlap", "true"), 2, "a switch takes no value"),
    Case("sizes no JSON", flags("--model.sizes", "{"), 2, "model.sizes"),
    Case("half a step", flags("--train.steps", "1.5"), 2, "train.steps: .*valid integer.*found '1.5'"),
    Case("no step", flags("--train.steps", "0"), 2, "train.steps: .* greater than or equal to 1, found '?0"),
    Case("too many steps", flags("--train.steps", str(2**63)), 2, "train.steps: .* less than or equal to"),
    Case("lr 0", flags("--optimizer.lr", "0"), 2, "optimizer.lr: .* greater than 0"),
    Case("lr negative", flags("--optimizer.lr=-1e-3"), 2, "optimizer.lr: .* greater than 0"),
    Case("lr nan", flags("--optimizer.lr", "nan"), 2, "optimizer.lr: "),
    Case("lr infinite", flags("--optimizer.lr", "inf"), 2, "optimizer.lr: "),
    Case("lr huge", flags("--optimizer.lr", "1e9"), 2, "optimizer.lr: .* less than 10"),
    Case("beta", flags("--optimizer.betas", "[0.9,1.5]"), 2, "optimizer.betas are .*expected two numbers in"),
    Case("three betas", flags("--optimizer.betas", "0.9,0.9,0.9"), 2, "optimizer.betas"),
    Case("clip infinite", flags("--train.max-grad-norm", "inf"), 2, "train.max_grad_norm: input should be a finite"),
    Case("ranks negative", flags("--launch.ranks=-1"), 2, "launch.ranks: .* greater than or equal to 0"),
    Case("ranks and a half", flags("--launch.ranks", "1.5"), 2, "launch.ranks: .* valid integer"),
    Case("ranks in words", flags("--launch.ranks", "two"), 2, "launch.ranks: .* valid integer.*found 'two'"),
    Case("seed negative", flags("--run.seed=-1"), 2, "run.seed: .* greater than or equal to 0"),
    Case("seed too large", flags("--run.seed", str(2**63)), 2, "run.seed: .* less than"),
    Case("seed and a half", flags("--run.seed", "1.5"), 2, "run.seed: .* valid integer"),
    Case("sequence of 0", flags("--data.sequence-length", "0"), 2, "data.sequence_length: .* greater than or equal to"),
    Case("sequence of -1", flags("--data.sequence-length=-1"), 2, "data.sequence_length: .* greater than or equal"),
    Case("sequence of 1", flags("--data.sequence-length", "1"), 2, "data.sequence_length: .* greater than or equal"),
    Case("token of 3 bytes", flags("--data.token-size", "3"), 2, "data.token_size"),
    Case("unknown window", flags("--data.window", "none"), 2, "data.window.*overlap1.*psyche"),
    Case("unknown schedule", flags("--schedule.kind", "step"), 2, "schedule.kind: .*'cosine', 'linear'"),
    Case("unknown dtype", flags("--model.dtype", "float16"), 2, "model.dtype: .*'float32' or 'bfloat16'"),
    Case("unknown launcher", flags("--launch.launcher", "mpi"), 2, "launch.launcher: .*'torchrun' or 'direct'"),
    Case("Psyche's seed", flags("--data.psyche-seed", "xyz"), 2, "data.psyche_seed"),
    Case("keep none", flags("--checkpoint.keep-last", "0"), 2, "checkpoint.keep_last: .* greater than or equal to 1"),
    Case("grace negative", flags("--launch.grace=-1"), 2, "launch.grace: .* greater than or equal to 0"),
    Case("run.dir elsewhere", flags("--run.dir", "ftp://b/x"), 2, "ftp://b/x has the scheme ftp://, which cannot b"),
    Case("run.dir empty", flags("--run.dir", ""), 2, "run.dir is ''"),
    Case("data.path empty", toml("[data]\npath = ''\n"), 2, "c.toml: data.path: .* at least 1 character"),
    Case("rounds of 0 steps", flags("--strategy.kind", "diloco", "--strategy.sync-every", "0"), 2, "sync_every is '0'"),
    Case("fragments", flags(*DILOCO, "--strategy.num-fragments", "3"), 2, "does not divide .* 50: set .* to 51"),
    Case("delay", flags(*DILOCO, "--strategy.fragment-sync-delay", "50"), 2, "_delay is 50, .*: set it to at most 49"),
    Case("unknown codec", flags(*DILOCO, "--strategy.compression", "int3"), 2, "strategy.compression: .*'int8'"),
    Case("Nesterov of nothing", flags(*DILOCO, "--strategy.outer-momentum", "0"), 2, "nesterov is on but .* is 0: set"),
    Case("outer lr 0", flags(*DILOCO, "--strategy.outer-lr", "0"), 2, "strategy.outer_lr: .* greater than 0"),
    Case("outer momentum 1", flags(*DILOCO, "--strategy.outer-momentum", "1"), 2, "strategy.outer_momentum: .* less"),
    Case("4 bits", flags(*SPARSE, "--strategy.quantize-bits", "4"), 2, "strategy.quantize_bits: .* 2 or 8"),
    Case("top of too many", flags(*SPARSE, "--strategy.compression-topk", "5000"), 2, "set it to at most 4096"),
    Case("top k of DisTrO", flags(*DISTRO, "--strategy.compression-topk", "5000"), 2, "set it to at most 4096"),
    Case(
        "chunk of DisTrO", flags(*DISTRO, "--strategy.compression-chunk", "65"), 2, "strategy.compression_chunk: .*64"
    ),
]

CLUSTER = [
    Case("weights of 3", flags("--launch.weights", "[1,2,3]"), 2, "launch.weights are 3 numbers for 2 ranks: give one"),
    Case("ranks over batch", flags("--launch.ranks", "9"), 2, "launch.ranks is 9, more than train.total_batch 8: set"),
    Case(
        "ranks over slots",
        flags("--launch.mode", "executors", "--launch.ranks", "3"),
        2,
        "launch.ranks is 3, but the cluster has 2 slots for barrier tasks: set launch.ranks to at most 2",
    ),
    Case("direct but local", flags("--launch.launcher", "direct"), 2, "launch.launcher is direct, .* to torchrun"),
    Case(
        "one mirror", flags("--data.mirrors", '["https://a.org/d"]'), 2, "no mirrors for data.path .*: give two roots"
    ),
    *(
        Case(f"{key} {value}", flags("--launch.mode", "executors"), 2, message, conf={key: value})
        for key, value, message in [
            ("spark.dynamicAllocation.enabled", "true", "submit with --conf spark.dynamicAllocation.enabled=false"),
            ("spark.speculation", "true", "second copy of a slow rank: submit with --conf spark.speculation=false"),
            ("spark.ssl.enabled", "true", "accept that with --conf pytorch.spark.distributor.ignoreSsl=true"),
            ("spark.ssl.enabled", "True", "accept that with --conf pytorch.spark.distributor.ignoreSsl=true"),
            ("spark.task.resource.gpu.amount", "0.5", "spark.task.resource.gpu.amount is 0.5, expected 1"),
            ("spark.task.resource.gpu.amount", "2", "spark.task.resource.gpu.amount is 2, expected 1"),
        ]
    ),
    Case(
        "a GPU that is not there",
        flags(),
        2,
        "spark.driver.resource.gpu.amount is 1, .* no GPU",
        conf={"spark.driver.resource.gpu.amount": "1"},
    ),
]

CASES = [*FILES, *ARGUMENTS, *CLUSTER]
