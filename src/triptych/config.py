"""Configuration: one frozen dataclass per role, composed of small parts. Building one does no I/O.

The command line is derived from these fields (``cli.py``); environment variables are read in
``secrets_from_environment`` and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
TransportName = Literal["auto", "shm", "mooncake", "http"]
MIB = 1 << 20


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is loaded."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Local folder or hub name."""
    dtype: Dtype = "auto"
    """"auto": float32 on CPU, the checkpoint's own on an accelerator."""
    device: str = "cpu"
    """Where this role computes: "cpu", "cuda", "cuda:1"."""
    load_format: Literal["auto", "dummy"] = "auto"
    """"dummy": random weights from the configuration alone, equal in every process."""
    revision: str | None = None
    """Hub revision."""
    memory_fraction: float = 1.0
    """Share of a GPU's memory that this role's process may take, so that others on the same GPU
    keep theirs. Every process takes about 0.5 GiB for CUDA itself besides."""
    compile: bool = True
    """Compile vision blocks and decoder layers, at start, and capture what repeats as CUDA graphs.
    Nothing of it on a CPU."""
    compile_cache: Path = Path("~/.cache/triptych/compiled")
    """Folder that keeps compiled code for the next start."""


@dataclass(frozen=True)
class Timeouts:
    """Every wait has a name and an end. Seconds."""

    connect: float = 5.0
    """TCP connection to a peer."""
    handshake: float = 5.0
    """Challenge, hello and welcome on a new channel."""
    heartbeat: float = 1.0
    """Between two heartbeats on a channel."""
    silence: float = 10.0
    """A channel on which nothing has come for this long is lost."""
    lease: float = 60.0
    """A lease ends when its holder has been silent for this long. Longer than ``transfer``."""
    transfer: float = 20.0
    """One read by the transport, from submission to the last byte."""
    pool: float = 30.0
    """Waiting for room in a pool before the request is refused with 429."""
    embedding: float = 120.0
    """From a consumer's claim of an embedding to its being ready."""
    kv: float = 300.0
    """From a consumer's claim of a KV slot to its last chunk."""
    rpc: float = 10.0
    """A control request between roles, from its last byte to the answer."""
    media: float = 10.0
    """Fetching one image or video from a URL."""
    request: float = 600.0
    """A whole request, whatever it is doing."""
    worker: float = 20.0
    """Waiting for a worker of a needed role to be known to the router. Long enough for one that
    died to be started again."""
    drain: float = 20.0
    """Finishing running requests at shutdown."""
    rank: float = 60.0
    """Ranks of one group waiting for each other, within a step and at shutdown."""
    rank_start: float = 600.0
    """Until all ranks of a group have started, and until all have loaded their weights."""


@dataclass(frozen=True)
class NetworkConfig:
    """Where a worker listens and whom it serves."""

    router: str = "http://127.0.0.1:8000"
    """Base URL of the router this worker registers with."""
    host: str = "127.0.0.1"
    """Interface to bind. Anything but loopback needs a shared secret of your own."""
    port: int = 0
    """0: any free port."""
    advertise: str | None = None
    """Host name that peers use to reach this worker; by default ``host``."""
    transport: TransportName = "auto"
    """Force one transport for what this worker reads and offers; "auto" probes."""
    parent_pipe: int = -1
    """File descriptor that closes when the launching process is gone; -1: none."""


@dataclass(frozen=True)
class EngineConfig:
    """The language engine's memory and batch limits."""

    kv_mib: int = 64
    """MiB of KV cache; 0: what ``--memory-fraction`` of a GPU leaves."""
    block_size: int = 16
    """Tokens of a KV block."""
    chunk_tokens: int = 0
    """Most tokens of one step, prefill and decode together. What runs or arrives meanwhile waits
    for its end, so more is not better. 0: 512 on a CPU, 2048 on a GPU."""
    max_sequences: int = 64
    """Most sequences running at once."""
    max_model_len: int = 0
    """Longest prompt plus answer; 0: what the model allows, capped by the KV cache."""
    threads: int = 0
    """CPU threads of the model's operations; 0: torch's default."""
    overlap: Literal["adaptive", "off", "always"] = "adaptive"
    """Prompts with images that are still to come: "always" computed as far as they go, "off" not at
    all (but as with "always" where a prompt's embeddings together do not fit ``--landing-mib``),
    "adaptive" with what would be idle otherwise."""
    prefix_cache: bool = True
    """Keep the KV of past prompts and answers until its memory is needed: one that begins like them
    is not computed, nor are its images read, as far as it is the same."""
    attention: Literal["auto", "flashinfer", "sdpa"] = "auto"
    """"flashinfer": float16 or bfloat16 on CUDA; "sdpa": torch's own, sequence by sequence; "auto":
    the first if it can be had."""
    run_ahead: Literal["auto", "on", "off"] = "auto"
    """Launch a decode step before the tokens of the one before it have been looked at, and the next
    chunk of a prompt when the one before it is nearly over: "auto" where decode steps are captured,
    so that the device would wait for the host."""
    selftest: bool = True
    """Compare the engine with the plain model at start and refuse a model it gets wrong."""
    tensor_parallel: int = 1
    """Processes that share the model, its heads and its KV cache; ``kv_mib`` is each one's. On
    CUDA they take consecutive devices, from ``--device`` on."""
    pipeline_parallel: int = 1
    """Refused if it is not 1: layers are not spread over processes, heads are
    (``--tensor-parallel``)."""

    def step_tokens(self, device_type: str) -> int:
        """``chunk_tokens`` on such a device."""
        return self.chunk_tokens or (512 if device_type == "cpu" else 2048)


@dataclass(frozen=True)
class LandingConfig:
    """Where a consumer lets embeddings land."""

    landing_mib: int = 32
    """MiB of pool memory for embeddings on their way into the model. Those of one request may be
    more together, each single one not."""


@dataclass(frozen=True)
class MediaLimits:
    """Of a file, its pixels, a video's sampled frames; and how many files of a request."""

    max_bytes: int = 32 * MIB
    max_video_bytes: int = 128 * MIB
    max_pixels: int = 64_000_000
    max_frame_pixels: int = 4096 * 2304
    max_images: int = 64
    max_videos: int = 8
    max_video_s: float = 3600.0
    """Seconds that a video may last."""
    max_frames: int = 768
    """Most frames of a video that are sampled and encoded."""
    decode_s: float = 30.0
    """For reading what a video is, and again for decoding its frames."""


@dataclass(frozen=True)
class TlsConfig:
    """The API under TLS, on a port of its own beside the plain one that workers use."""

    certificate: Path | None = None
    """PEM file with the certificate and what it was signed by. With a key, there is TLS."""
    key: Path | None = None
    """PEM file with its private key."""
    host: str = "127.0.0.1"
    """Interface to bind."""
    port: int = 8443


@dataclass(frozen=True)
class RouterConfig:
    """The OpenAI API: media, prompt, placement, streaming."""

    model: tyro.conf.OmitArgPrefixes[ModelConfig]
    host: str = "127.0.0.1"
    port: int = 8000
    topology: Literal["E/P/D", "E/PD", "EPD", "any"] = "any"
    """The topology asked for; /ready is an error while it is not in effect."""
    encoders: int = 1
    """Encoder workers asked for; fewer are an error in /ready, and so for the other roles."""
    prefills: int = 1
    """Prefill workers asked for."""
    decodes: int = 1
    """Decode workers asked for."""
    languages: int = 1
    """Language workers asked for."""
    served_name: str | None = None
    """Name of the model in the API; by default what was given on the command line."""
    allowed_media_root: Path | None = None
    """Folder below which ``file://`` URLs may be read; none by default."""
    allow_private_media: bool = False
    """Fetch images from loopback and private addresses too (tests and closed networks)."""
    limits: MediaLimits = field(default_factory=MediaLimits)
    timeouts: Timeouts = field(default_factory=Timeouts)
    tls: TlsConfig = field(default_factory=TlsConfig)
    max_body_mib: int = 256
    """Largest request body."""
    max_requests: int = 256
    """Most requests in progress; more are answered 429."""
    max_held_mib: int = 2048
    """Most MiB of request bodies and fetched media held at once; more are answered 429."""
    max_backlog: float = 8.0
    """Most tokens outstanding at a worker, in multiples of its KV cache; more are answered 429."""
    max_choices: int = 8
    """Most answers to one request (``n``)."""
    parent_pipe: int = -1
    """File descriptor that closes when the launching process is gone; -1: none."""


@dataclass(frozen=True)
class EncoderConfig:
    """Vision tower and projector: images and videos in, embeddings out."""

    model: tyro.conf.OmitArgPrefixes[ModelConfig]
    network: tyro.conf.OmitArgPrefixes[NetworkConfig] = field(default_factory=NetworkConfig)
    limits: MediaLimits = field(default_factory=MediaLimits)
    timeouts: Timeouts = field(default_factory=Timeouts)
    pool_mib: int = 64
    """MiB of registered pool: embeddings in use and cached."""
    batch_patches: int = 8192
    """Most vision patches of one forward."""
    queue_patches: int = 1_000_000
    """Most vision patches waiting; more are refused with 429."""
    media_threads: int = 0
    """Threads that decode images and videos; as many preprocess, unless a GPU does. 0: one for
    every two cores, at most 8."""
    threads: int = 0
    """CPU threads of the model's operations; 0: torch's default."""


@dataclass(frozen=True)
class PrefillConfig:
    """Embeddings and tokens in, KV cache and first token out."""

    model: tyro.conf.OmitArgPrefixes[ModelConfig]
    network: tyro.conf.OmitArgPrefixes[NetworkConfig] = field(default_factory=NetworkConfig)
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=EngineConfig)
    landing: tyro.conf.OmitArgPrefixes[LandingConfig] = field(default_factory=LandingConfig)
    timeouts: Timeouts = field(default_factory=Timeouts)


@dataclass(frozen=True)
class DecodeConfig:
    """KV cache in, tokens out."""

    model: tyro.conf.OmitArgPrefixes[ModelConfig]
    network: tyro.conf.OmitArgPrefixes[NetworkConfig] = field(default_factory=NetworkConfig)
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=EngineConfig)
    timeouts: Timeouts = field(default_factory=Timeouts)


@dataclass(frozen=True)
class LanguageConfig:
    """Prefill and decode in one engine, without a KV hand-off."""

    model: tyro.conf.OmitArgPrefixes[ModelConfig]
    network: tyro.conf.OmitArgPrefixes[NetworkConfig] = field(default_factory=NetworkConfig)
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=EngineConfig)
    landing: tyro.conf.OmitArgPrefixes[LandingConfig] = field(default_factory=LandingConfig)
    timeouts: Timeouts = field(default_factory=Timeouts)


@dataclass(frozen=True)
class SharedConfig:
    """An encoder and a language worker in one process, which so share a GPU kernel by kernel: two
    processes have it in turns. With ``--port`` the encoder has that one, the other the next."""

    model: tyro.conf.OmitArgPrefixes[ModelConfig]
    network: tyro.conf.OmitArgPrefixes[NetworkConfig] = field(default_factory=NetworkConfig)
    limits: MediaLimits = field(default_factory=MediaLimits)
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=EngineConfig)
    landing: tyro.conf.OmitArgPrefixes[LandingConfig] = field(default_factory=LandingConfig)
    timeouts: Timeouts = field(default_factory=Timeouts)
    pool_mib: int = EncoderConfig.pool_mib
    """As of ``encoder``. Likewise below."""
    batch_patches: int = EncoderConfig.batch_patches
    queue_patches: int = EncoderConfig.queue_patches
    media_threads: int = EncoderConfig.media_threads

    @property
    def halves(self) -> dict[str, EncoderConfig | LanguageConfig]:
        """What each of its workers is given, by role."""
        following = self.network.port + 1 if self.network.port else 0
        return {
            "encoder": EncoderConfig(
                model=self.model,
                network=self.network,
                limits=self.limits,
                timeouts=self.timeouts,
                pool_mib=self.pool_mib,
                batch_patches=self.batch_patches,
                queue_patches=self.queue_patches,
                media_threads=self.media_threads,
                threads=self.engine.threads,
            ),
            "language": LanguageConfig(
                model=self.model,
                network=replace(self.network, port=following),
                engine=self.engine,
                landing=self.landing,
                timeouts=self.timeouts,
            ),
        }


@dataclass(frozen=True)
class ServeConfig:
    """A whole topology on this machine."""

    model: tyro.conf.OmitArgPrefixes[ModelConfig]
    topology: Literal["E/P/D", "E/PD", "E+PD", "EPD"] = "E/P/D"
    """E/P/D: encoders, prefill and decode apart. E/PD: encoders and language workers. E+PD: the
    same, each language worker with an encoder in its process. EPD: everything in one process."""
    encoders: int = 1
    """Encoder workers."""
    prefills: int = 1
    """Prefill workers of E/P/D."""
    decodes: int = 1
    """Decode workers of E/P/D."""
    languages: int = 1
    """Language workers of E/PD and E+PD."""
    host: str = "127.0.0.1"
    port: int = 8000
    tls: TlsConfig = field(default_factory=TlsConfig)
    transport: TransportName = "auto"
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=EngineConfig)
    landing: tyro.conf.OmitArgPrefixes[LandingConfig] = field(default_factory=LandingConfig)
    pool_mib: int = 64
    """MiB of each encoder's pool."""
    allow_private_media: bool = False
    """Fetch images from loopback and private addresses too (tests and closed networks)."""
    allowed_media_root: Path | None = None
    """Folder below which ``file://`` URLs may be read; none by default."""
    start_timeout: float = 180.0
    """Seconds until every child must be ready."""
    log_folder: Path | None = None
    """Folder of the children's logs; by default a temporary one, named at start."""
    encoder_devices: tuple[str, ...] = ()
    """Devices of the encoders, in turn; by default ``--device``. Likewise below."""
    prefill_devices: tuple[str, ...] = ()
    decode_devices: tuple[str, ...] = ()
    language_devices: tuple[str, ...] = ()
    batch_patches: int = EncoderConfig.batch_patches
    """Most vision patches of one forward of an encoder."""
    media_threads: int = EncoderConfig.media_threads
    """Threads of each encoder that decode and preprocess images and videos."""
    parent_pipe: int = -1
    """File descriptor that closes when the launching process is gone; -1: none."""


@dataclass(frozen=True)
class DemoConfig:
    """Requests with several images, through E/P/D and through EPD, compared token by token."""

    images: tuple[Path, ...] = ()
    """Image files; by default four drawn pictures."""
    prompt: str | None = None
    """One question; by default two about the drawn pictures."""
    max_tokens: int = 32
    """Tokens of the answer."""
    model: str | None = None
    """Local folder or hub name; by default the small model that comes with the package."""
    folder: Path = Path(".demo")
    """Where the logs go."""
    transport: TransportName = "auto"
    threads: int = 1
    """CPU threads of each process."""


@dataclass(frozen=True)
class Secrets:
    """What must not stand on a command line or in a log."""

    shared: bytes = field(repr=False)
    """Authenticates roles to each other."""
    api_key: str | None = field(repr=False, default=None)
    """What clients of the public API must send; None: nothing is asked."""
    operator_key: str | None = field(repr=False, default=None)
    """What whoever drains workers must send; None: nobody may by HTTP."""
