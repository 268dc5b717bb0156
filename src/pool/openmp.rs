//! The threads of the OpenMP runtime that torch has loaded, through `GOMP_parallel`: the entry that GCC's libgomp made
//! for compiled `#pragma omp parallel`, and that LLVM's libomp and Intel's libiomp5 export as well.

#![allow(unsafe_code)]

use std::ffi::{CStr, c_uint, c_void};
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// `void GOMP_parallel(void (*fn)(void *), void *data, unsigned num_threads, unsigned flags)`: calls `fn(data)` on the
/// caller and on up to `num_threads - 1` other threads, and returns when all have.
type Parallel = unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);

/// A loaded OpenMP runtime.
pub(super) struct Runtime {
    parallel: Parallel,
    library: String,
}

static RUNTIME: OnceLock<Option<Runtime>> = OnceLock::new();

/// Whether this process is a fork of the one that found the runtime. libgomp does not survive that: a child would wait
/// for threads that stayed behind in its parent.
static FORKED: AtomicBool = AtomicBool::new(false);

extern "C" fn forked() {
    FORKED.store(true, Ordering::Relaxed);
}

/// Looks for a runtime, once a process.
pub(super) fn find() {
    RUNTIME.get_or_init(Runtime::loaded);
}

/// The runtime that was found, in the process that found it.
pub(super) fn runtime() -> Option<&'static Runtime> {
    RUNTIME.get()?.as_ref().filter(|_| !FORKED.load(Ordering::Relaxed))
}

impl Runtime {
    /// The one that torch's own calls reach: a preloaded or global one, else the one that torch is linked with.
    fn loaded() -> Option<Self> {
        const NAME: &CStr = c"GOMP_parallel";
        const TORCH: &CStr = c"libtorch_cpu.so";
        // SAFETY: both strings end in a zero. RTLD_NOLOAD only gives a handle on what is loaded, and that handle is never
        // closed, so the symbol stays where it is.
        let symbol = unsafe {
            let global = libc::dlsym(libc::RTLD_DEFAULT, NAME.as_ptr());
            let torch = || libc::dlopen(TORCH.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD);
            let linked =
                |handle: *mut c_void| if handle.is_null() { handle } else { libc::dlsym(handle, NAME.as_ptr()) };
            if global.is_null() { linked(torch()) } else { global }
        };
        // SAFETY: `forked` may run in a child at any time, as all it does is to set a flag.
        if symbol.is_null() || unsafe { libc::pthread_atfork(None, None, Some(forked)) } != 0 {
            return None;
        }
        // SAFETY: a symbol of this name has this signature, in all runtimes that export it.
        let parallel = unsafe { std::mem::transmute::<*mut c_void, Parallel>(symbol) };
        Some(Self { parallel, library: file_of(symbol) })
    }

    /// File name of the library.
    pub(super) fn library(&self) -> &str {
        &self.library
    }

    /// Runs `member` on the caller and on up to `threads - 1` others. It must not unwind; if it does the process ends.
    pub(super) fn run<F: Fn() + Sync>(&self, threads: usize, member: &F) {
        extern "C" fn call<F: Fn() + Sync>(member: *mut c_void) {
            // SAFETY: it is the `&F` below, which outlives the call of `parallel`, and may be shared as `F` is `Sync`.
            let member = unsafe { &*member.cast_const().cast::<F>() };
            member();
        }
        let data = std::ptr::from_ref(member).cast_mut().cast();
        // SAFETY: `call::<F>` takes what `data` is; all calls of it are over when `parallel` returns.
        unsafe { (self.parallel)(call::<F>, data, c_uint::try_from(threads).unwrap_or(1), 0) }
    }
}

/// File name of the library that holds `symbol`.
fn file_of(symbol: *const c_void) -> String {
    // SAFETY: all zero is a valid `Dl_info`; where `dladdr` fills it in, the name is a string of the loader, which lives
    // as long as the library.
    let path = unsafe {
        let mut info: libc::Dl_info = std::mem::zeroed();
        if libc::dladdr(symbol, &raw mut info) == 0 || info.dli_fname.is_null() {
            return "unknown".into();
        }
        CStr::from_ptr(info.dli_fname).to_string_lossy()
    };
    Path::new(&*path).file_name().map_or_else(|| path.to_string(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
pub(super) mod tests {
    /// Loads the system's libgomp, so that every library of the process can see it; says whether there is one.
    pub fn load() -> bool {
        // SAFETY: the string ends in a zero; loading libgomp runs no code but its own initialisation.
        !unsafe { libc::dlopen(c"libgomp.so.1".as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) }.is_null()
    }
}
