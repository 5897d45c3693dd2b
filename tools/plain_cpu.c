/* A plain processor to test on: a library to preload, under which a program sees AVX2 and nothing newer.

   Most laptops have no AVX-512, no bfloat16 units and no AMX, and what PyTorch, oneDNN, MKL and bitsandbytes compute
   there differs from what they compute on a server. Each of them asks the CPUID instruction what it may use. Linux can
   make that instruction trap ("CPUID faulting", arch_prctl(ARCH_SET_CPUID)): it then arrives here as a SIGSEGV, is
   answered with the processor's own words less the bits below, and the program goes on, at full speed, with the kernels
   of a plain processor.

   What it does not do: glibc has chosen its string functions before this is loaded, and /proc/cpuinfo still names the
   real processor. It needs x86-64 Linux, and a kernel and a processor that offer CPUID faulting; tools/plain_cpu.py
   builds it, looks whether that is so, and runs a command under it. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#ifndef ARCH_SET_CPUID
#define ARCH_SET_CPUID 0x1012
#endif
#define BIT(n) (1u << (n))

/* What is hidden: Intel's Software Developer's Manual, volume 2A, CPUID, leaf 7. */
static const uint32_t
  /* AVX512: F, DQ, IFMA, PF, ER, CD, BW, VL */
  LEAF7_EBX = BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31),
  /* AVX512: VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ */
  LEAF7_ECX = BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14),
  /* AVX512: 4VNNIW, 4FMAPS, VP2INTERSECT, FP16; AMX: BF16, TILE, INT8 */
  LEAF7_EDX = BIT(2) | BIT(3) | BIT(8) | BIT(23) | BIT(22) | BIT(24) | BIT(25),
  /* AVX-VNNI, AVX512-BF16, AMX-FP16, AVX-IFMA */
  LEAF7_1_EAX = BIT(4) | BIT(5) | BIT(21) | BIT(23),
  /* AVX-VNNI-INT8, AVX-NE-CONVERT, AMX-COMPLEX, AVX-VNNI-INT16, AVX10 */
  LEAF7_1_EDX = BIT(4) | BIT(5) | BIT(8) | BIT(10) | BIT(19);

static int (*next_sigaction)(int, const struct sigaction *, struct sigaction *);
static struct sigaction theirs;  /* what the program wants to be done about a SIGSEGV of its own */

/* Kept for each thread, handed on to its children, and switched off by exec, after which this library starts anew. */
static long trap_cpuid(int on) { return syscall(SYS_arch_prctl, ARCH_SET_CPUID, !on); }

static void answer(greg_t *reg) {
  uint32_t a, b, c, d, leaf = reg[REG_RAX], sub = reg[REG_RCX];
  trap_cpuid(0);
  __cpuid_count(leaf, sub, a, b, c, d);
  trap_cpuid(1);
  if (leaf == 7 && sub == 0) b &= ~LEAF7_EBX, c &= ~LEAF7_ECX, d &= ~LEAF7_EDX;
  if (leaf == 7 && sub == 1) a &= ~LEAF7_1_EAX, d &= ~LEAF7_1_EDX;
  reg[REG_RAX] = a, reg[REG_RBX] = b, reg[REG_RCX] = c, reg[REG_RDX] = d;
  reg[REG_RIP] += 2;  /* past the instruction */
}

static void on_fault(int sig, siginfo_t *info, void *context) {
  greg_t *reg = ((ucontext_t *)context)->uc_mcontext.gregs;
  const uint8_t *at = (const uint8_t *)reg[REG_RIP];
  if (info->si_code == SI_KERNEL && at[0] == 0x0f && at[1] == 0xa2) { answer(reg); return; }  /* 0f a2 is CPUID */
  if (theirs.sa_flags & SA_SIGINFO) { theirs.sa_sigaction(sig, info, context); return; }
  if (theirs.sa_handler != SIG_DFL && theirs.sa_handler != SIG_IGN) { theirs.sa_handler(sig); return; }
  struct sigaction usual = {.sa_handler = SIG_DFL};  /* a crash like any other: once more, and it ends the program */
  next_sigaction(sig, &usual, NULL);
  if (info->si_code <= 0) raise(sig);                /* unless somebody has only sent the signal */
}

/* The program's own handler for SIGSEGV (Python's faulthandler has one) is remembered, and must not replace ours. */
int sigaction(int sig, const struct sigaction *act, struct sigaction *was) {
  if (!next_sigaction) next_sigaction = dlsym(RTLD_NEXT, "sigaction");
  if (sig != SIGSEGV) return next_sigaction(sig, act, was);
  struct sigaction before = theirs;
  if (act) theirs = *act;
  if (was) *was = before;
  return 0;
}

sighandler_t signal(int sig, sighandler_t handler) {
  struct sigaction act = {.sa_handler = handler, .sa_flags = SA_RESTART}, was;
  return sigaction(sig, &act, &was) ? SIG_ERR : was.sa_handler;
}

__attribute__((constructor)) static void start(void) {
  struct sigaction ours = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
  if (!next_sigaction) next_sigaction = dlsym(RTLD_NEXT, "sigaction");
  next_sigaction(SIGSEGV, &ours, &theirs);
  if (trap_cpuid(1)) {  /* better no run than one on another processor */
    perror("plain_cpu: no CPUID faulting here");
    exit(1);
  }
}
