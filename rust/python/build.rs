//! Copies the CUDA sources to OUT_DIR, from where maturin puts them into the wheel as `moekern/cuda/`.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let sources = manifest.join("../../cuda");
    let target = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo"));
    println!("cargo::rerun-if-changed={}", sources.display());
    for entry in fs::read_dir(&sources)? {
        let path = entry?.path();
        let is_source = path.extension().is_some_and(|ext| ext == "cu" || ext == "cuh");
        if is_source {
            println!("cargo::rerun-if-changed={}", path.display());
            fs::copy(&path, target.join(Path::new(path.file_name().expect("a file"))))?;
        }
    }
    Ok(())
}
