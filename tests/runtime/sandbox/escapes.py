"""Programs that try to leave the sandbox. Each prints ESCAPED where it succeeds, and is written as a call's text.

`V` holds what an attacker may well know (`host.Host.facts`). `stops` says for each sandbox who stops it, and the words
by which that shows in the result.
"""

from __future__ import annotations

from dataclasses import dataclass

PRELUDE = """
import ctypes, errno, fcntl, json, os, resource, signal, socket, struct, sys, threading, time
V, NUMBERS = json.loads(FACTS)
libc = ctypes.CDLL(None, use_errno=True)

def call(name, *arguments):
    arguments = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    if libc.syscall(ctypes.c_long(NUMBERS[name]), *arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

def escaped(if_so=True):
    if if_so:
        print("ESCAPED")
"""

GONE = "No such file or directory"
DENIED = "Permission denied"
REFUSED = "Operation not permitted"
ABSENT = "Function not implemented"
READ_ONLY = "Read-only file system"

MOUNTS = ("mount namespace", GONE)
LANDLOCK = ("Landlock", DENIED)
NO_CALL = ("seccomp", ABSENT)
NOT_ALLOWED = ("seccomp", REFUSED)
SYSCALLS = {"bubblewrap": NO_CALL, "landlock": NO_CALL}
RULES = {"bubblewrap": NOT_ALLOWED, "landlock": NOT_ALLOWED}
FILES = {"bubblewrap": MOUNTS, "landlock": LANDLOCK}


@dataclass(frozen=True)
class Escape:
    """One try. `control`: it succeeds without a sandbox, which is tried, too; why not, where it is not tried."""

    name: str
    program: str
    stops: dict[str, tuple[str, str]]
    control: bool | str = True


ESCAPES = [
    Escape(
        "read the memory of the parent",
        """
with open(f"/proc/{V['pid']}/mem", "rb") as memory:
    memory.seek(V["address"])
    escaped(memory.read(V["secret_size"]).startswith(b"recmas-secret"))
""",
        FILES,
    ),
    Escape(
        "write the memory of the parent",
        """
with open(f"/proc/{V['pid']}/mem", "r+b", buffering=0) as memory:
    memory.seek(V["address"])
    first = memory.read(1)
    memory.seek(V["address"])
    escaped(memory.write(first) == 1)
""",
        FILES,
    ),
    Escape(
        "process_vm_readv of the parent",
        """
size = V["secret_size"]
buffer = ctypes.create_string_buffer(size)
local = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), size)
remote = (ctypes.c_uint64 * 2)(V["address"], size)
call("process_vm_readv", V["pid"], local, 1, remote, 1, 0)
escaped(buffer.raw.startswith(b"recmas-secret"))
""",
        SYSCALLS,
    ),
    Escape(
        "trace the parent",
        """
call("ptrace", 0x4206, V["sleeper"], 0, 0)  # PTRACE_SEIZE, of another process of the same user
escaped()
""",
        SYSCALLS,
    ),
    Escape(
        "read the environment of the parent",
        """
escaped(b"PATH=" in open(f"/proc/{V['pid']}/environ", "rb").read())
""",
        FILES,
    ),
    Escape(
        "open a descriptor of the parent",
        """
escaped(open(f"/proc/{V['pid']}/fd/{V['fd']}", "rb").read().startswith(b"recmas-secret"))
""",
        FILES,
    ),
    Escape(
        "kill another process",
        """
os.kill(V["sleeper"], 0)  # whether it may
escaped()
""",
        {"bubblewrap": ("process namespace", "No such process"), "landlock": NOT_ALLOWED},
    ),
    Escape(
        "signal another process group",
        """
os.killpg(V["sleeper"], 0)
escaped()
""",
        {"bubblewrap": ("process namespace", "No such process"), "landlock": NOT_ALLOWED},
    ),
    Escape(
        "signal as the owner of a pipe",
        """
reading, writing = os.pipe()
fcntl.fcntl(reading, fcntl.F_SETOWN, V["sleeper"])
escaped(fcntl.fcntl(reading, fcntl.F_GETOWN) == V["sleeper"])
""",
        RULES,
    ),
    Escape(
        "read a secret file",
        """
escaped(open(V["file"], "rb").read().startswith(b"recmas-secret"))
""",
        FILES,
    ),
    Escape(
        "read the system's users",
        """
escaped("root" in open("/etc/passwd").read())
""",
        FILES,
    ),
    Escape(
        "read our own source",
        """
escaped(bool(open(V["repository"] + "/dtypes.py").read()))
""",
        FILES,
    ),
    Escape(
        "write into site-packages",
        """
path = V["prefix"] + "/recmas-was-here.pth"
open(path, "w").close()
os.unlink(path)
escaped()
""",
        {"bubblewrap": ("read-only mount", READ_ONLY), "landlock": LANDLOCK},
    ),
    Escape(
        "write into our own package",
        """
path = V["repository"] + "/was_here.py"
if not os.path.isdir(V["repository"] + "/system"):  # a checkout below /tmp, where the sandbox has a /tmp of its own
    raise OSError("not the package's folder")
open(path, "w").close()
os.unlink(path)
escaped()
""",
        {"bubblewrap": ("mount namespace", ""), "landlock": LANDLOCK},
    ),
    Escape(
        "write into a folder of the host",
        """
open(V["mark"], "w").close()
os.unlink(V["mark"])
escaped()
""",
        FILES,
    ),
    Escape(
        "change the mode and times of a file of the host",
        """
try:
    os.utime(V["file"])
    escaped()
except OSError as error:
    print(error)
os.chmod(V["file"], 0o600)
escaped()
""",
        SYSCALLS,
    ),
    Escape(
        "a daemon that outlives the call",
        """
if os.fork() == 0:
    os.setsid()
    os._exit(0)
escaped()
""",
        RULES,
    ),
    Escape(
        "another program as a child",
        """
import subprocess
escaped(subprocess.run([sys.executable, "-c", ""]).returncode == 0)
""",
        RULES,
    ),
    Escape(
        "connect to a server",
        """
socket.create_connection(tuple(V["tcp"]), timeout=5).close()
escaped()
""",
        RULES,
    ),
    Escape(
        "send a DNS question",
        """
question = b"\\x13\\x37\\x01\\0\\0\\1\\0\\0\\0\\0\\0\\0\\6secret\\7example\\0\\0\\1\\0\\1"
escaped(socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(question, tuple(V["udp"])) > 0)
""",
        RULES,
    ),
    Escape(
        "send to an abstract unix socket",
        """
escaped(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"hi", V["abstract"]) > 0)
""",
        RULES,
    ),
    Escape(
        "send to a unix socket of the host's files",
        """
escaped(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"hi", V["path"]) > 0)
""",
        RULES,
    ),
    Escape(
        "send from one of a pair of sockets",
        """
one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
escaped(one.sendto(b"hi", V["abstract"]) > 0)
""",
        RULES,
    ),
    Escape(
        "redirect one of a connected pair of sockets",
        """
one, other = socket.socketpair()
try:
    one.sendto(b"hi", V["abstract"])
except OSError as error:
    print(error)
one.connect(V["abstract"])
escaped()
""",
        SYSCALLS,
        "a connected stream has no other address, with or without a sandbox",
    ),
    Escape(
        "fork bomb",
        """
for _ in range(40):
    if os.fork() == 0:
        time.sleep(2)
        os._exit(0)
escaped()
""",
        RULES,
    ),
    Escape(
        "thread bomb",
        """
threading.stack_size(1 << 16)
for _ in range(2000):
    threading.Thread(target=time.sleep, args=(3,), daemon=True).start()
time.sleep(1)
escaped()
""",
        dict.fromkeys(("bubblewrap", "landlock"), ("watch", "[stopped] at more than")),
    ),
    Escape(
        "memory bomb in one process",
        """
kept = []
while True:
    kept.append(bytearray(1 << 26))
    escaped(len(kept) > 32)
""",
        dict.fromkeys(("bubblewrap", "landlock"), ("RLIMIT_AS", "MemoryError")),
        "the same limit holds without a sandbox",
    ),
    Escape(
        "memory bomb in several processes",
        """
for _ in range(4):
    if os.fork() == 0:
        kept = bytearray(1 << 27)
        os._exit(0)
escaped()
""",
        RULES,
    ),
    Escape(
        "memory that belongs to no process",
        """
os.memfd_create("hidden")
escaped()
""",
        SYSCALLS,
    ),
    Escape(
        "disk filler",
        """
for number in range(12):
    with open(str(number), "wb") as file:
        file.write(bytes(15 << 20))
escaped()
""",
        {"bubblewrap": ("size of the temporary file system", "No space left on device"), "landlock": LANDLOCK},
    ),
    Escape(
        "many files",
        """
for number in range(10_000):
    open(str(number), "w").close()
escaped()
""",
        {"bubblewrap": ("watch", "[stopped] at more than 4096 files"), "landlock": LANDLOCK},
    ),
    Escape(
        "fill the devices' folder and the root",
        """
for place in ("/dev/shm", "/dev", "/"):
    try:
        path = place + "/recmas-filler"
        open(path, "wb").close()
        os.unlink(path)
        escaped()
    except OSError as error:
        print(error)
""",
        {"bubblewrap": ("read-only mount", READ_ONLY), "landlock": LANDLOCK},
    ),
    Escape(
        "use what descriptors it inherits",
        """
for fd in range(resource.getrlimit(resource.RLIMIT_NOFILE)[0]):
    try:
        found = os.fstat(fd)
    except OSError:
        continue
    escaped(found.st_ino == V["inode"])
    last = fd
print("last descriptor", last)
""",
        dict.fromkeys(("bubblewrap", "landlock"), ("subprocess closes them", "last descriptor 2")),
        "descriptors are closed without a sandbox, too",
    ),
    Escape(
        "type into the user's terminal",
        """
for path in ("/dev/tty", "/dev/pts/0", "/dev/console"):
    try:
        os.open(path, os.O_RDWR)
        escaped()
    except OSError as error:
        print(error)
fcntl.ioctl(0, 0x5412, b"x")  # TIOCSTI
escaped()
""",
        RULES,
        "a test has no terminal",
    ),
    Escape(
        "a symbolic link to a secret",
        """
try:
    os.symlink(V["file"], "link")
except PermissionError:
    os.chdir(os.path.dirname(V["file"]))
    escaped(open("id", "rb").read().startswith(b"recmas-secret"))
escaped(open("link", "rb").read().startswith(b"recmas-secret"))
""",
        FILES,
    ),
    Escape(
        "a hard link to a secret",
        """
os.link(V["file"], os.path.dirname(V["file"]) + "/link")
os.unlink(os.path.dirname(V["file"]) + "/link")
escaped()
""",
        FILES,
    ),
    Escape(
        "mount",
        """
call("mount", b"none", b"/tmp", b"tmpfs", 0, None)
escaped()
""",
        SYSCALLS,
        "it would change the machine of the test",
    ),
    Escape(
        "leave the root",
        """
call("chroot", b"/usr")
escaped()
""",
        SYSCALLS,
        "it needs privileges",
    ),
    Escape(
        "namespaces of its own, to gain privileges in them",
        """
call("unshare", 0x10000000)
escaped()
""",
        SYSCALLS,
        "not every user may make them",
    ),
    Escape(
        "a namespace by clone",
        """
call("clone", 0x10000000 | 17, 0, 0, 0, 0)
escaped()
""",
        RULES,
        "not every user may make them",
    ),
    Escape(
        "execute a setuid program of the host",
        """
os.execv(V["program"], [V["program"]])
""",
        {"bubblewrap": MOUNTS, "landlock": NOT_ALLOWED},
    ),
    Escape(
        "a file in shared memory",
        """
escaped(open(V["shared"], "rb").read().startswith(b"recmas-secret"))
""",
        FILES,
    ),
    Escape(
        "a segment of shared memory",
        """
call("shmget", V["key"], 4096, 0)
escaped()
""",
        SYSCALLS,
    ),
    Escape(
        "raise its limits",
        """
resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))
escaped()
""",
        {"bubblewrap": ("no privileges", "not allowed to raise maximum limit"), "landlock": ("seccomp", "not allowed")},
        "it needs privileges",
    ),
    Escape(
        "change the limits of another process",
        """
resource.prlimit(V["sleeper"], resource.RLIMIT_CORE, (0, 0))
escaped()
""",
        RULES,
    ),
    Escape(
        "devices of the kernel",
        """
import glob
for path in ("/dev/mem", "/dev/kmsg", "/dev/kvm", *glob.glob("/dev/vd*"), *glob.glob("/dev/sd*")):
    try:
        os.open(path, os.O_RDONLY)
        escaped()
    except OSError as error:
        print(error)
""",
        FILES,
        "which there are differs between machines",
    ),
    Escape(
        "set the clock",
        """
time.clock_settime(time.CLOCK_REALTIME, time.time())
escaped()
""",
        SYSCALLS,
        "it needs privileges",
    ),
    Escape(
        "set the name of the host",
        """
socket.sethostname("recmas")
escaped()
""",
        SYSCALLS,
        "it needs privileges",
    ),
    Escape(
        "calls with a history of holes",
        """
for name in ("io_uring_setup", "bpf", "userfaultfd", "keyctl", "add_key", "perf_event_open", "memfd_secret",
             "open_by_handle_at", "name_to_handle_at", "pidfd_open", "kexec_load", "init_module", "msgget", "mq_open",
             "io_setup", "personality", "setns", "pivot_root", "clone3", "sendmsg", "recvmsg", "tkill", "seccomp"):
    try:
        call(name, 0, 0, 0, 0, 0, 0)
        escaped()
    except OSError as error:
        escaped(error.errno != errno.ENOSYS)
print("all", os.strerror(errno.ENOSYS))
""",
        SYSCALLS,
        "what each answers differs between kernels",
    ),
    Escape(
        "flood the output",
        """
for _ in range(1000):
    print("x" * (1 << 20))
escaped()
""",
        dict.fromkeys(("bubblewrap", "landlock"), ("RLIMIT_FSIZE", "File too large")),
        "the same limit holds without a sandbox",
    ),
    Escape(
        "run for ever",
        """
while True:
    pass
""",
        dict.fromkeys(("bubblewrap", "landlock"), ("time limit", "")),
        "the same limit holds without a sandbox",
    ),
]
