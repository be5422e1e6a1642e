//! Copies the CUDA sources to OUT_DIR, from where maturin puts them into the wheel as `moekern/cuda/`.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let sources = manifest.join("../../cuda");
    let target = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo"));
    println!("cargo::rerun-if-changed={}", sources.display());
    // OUT_DIR outlives a build: a source renamed since would be shipped under both names.
    for stale in cuda_sources(&target)? {
        fs::remove_file(stale)?;
    }
    for path in cuda_sources(&sources)? {
        println!("cargo::rerun-if-changed={}", path.display());
        fs::copy(&path, target.join(path.file_name().expect("a file")))?;
    }
    Ok(())
}

fn cuda_sources(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let paths = fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<_>>>()?;
    Ok(paths.into_iter().filter(|path| path.extension().is_some_and(|ext| ext == "cu" || ext == "cuh")).collect())
}
